"""Random orders of arrivals, for hypothesis."""

from hypothesis import strategies as st

from orlomo_jax.traces.trace_validation import TraceEvent


@st.composite
def orders(draw):
    num_workers = draw(st.integers(1, 6))
    return draw(st.lists(st.integers(0, num_workers - 1), max_size=40)), num_workers


@st.composite
def synchronous_orders(draw):
    num_workers = draw(st.integers(1, 5))
    rounds = draw(st.lists(st.permutations(range(num_workers)), max_size=6))
    order = [worker for own in rounds for worker in own]
    return order[: draw(st.integers(0, len(order)))], num_workers


@st.composite
def eventful_runs(draw, bounded=False):
    """Draw a run by walking through it, and what a server would have noted with each report.

    If ``bounded``, workers wait so that no delay exceeds ``max_wait``, which is drawn as well; it
    is the last value. Else that is None.
    """
    num_workers = draw(st.integers(1, 5))
    max_wait = draw(st.integers(num_workers - 1, num_workers + 5)) if bounded else None
    late = draw(st.sets(st.integers(0, num_workers - 1)))
    holds = {worker: (0, 0) for worker in range(num_workers) if worker not in late}
    there, untouched_late = set(holds), set(late)
    next_round = {worker: int(worker in there) for worker in range(num_workers)}
    workers, held, events, waiting = [], [], [], []

    def send(worker, step):
        there.add(worker)
        untouched_late.discard(worker)
        holds[worker] = (step, next_round[worker])
        next_round[worker] += 1

    def send_to_waiting(step):
        while waiting:
            oldest = min([version for version, _ in holds.values()] + [step])
            busy = num_workers - len(waiting) + 1  # lost and absent workers count
            if max_wait is not None and step + busy - 1 - oldest > max_wait:
                break
            send(waiting.pop(0), step)

    for _ in range(draw(st.integers(0, 30))):
        step = len(workers)
        worker = draw(st.integers(0, num_workers - 1))
        if worker not in there:
            kind = "joined"
        elif worker in waiting:
            kind = "left"
        elif worker not in holds:
            kind = draw(st.sampled_from(["redispatched", "left"]))
        else:
            kind = draw(st.sampled_from(["arrived"] * 3 + ["lost", "left", "restarted"]))
        if kind == "arrived":
            workers.append(worker)
            held.append(holds[worker])
            step += 1
        else:
            events.append(TraceEvent(step, kind, worker))
        holds.pop(worker, None)
        if worker in waiting:
            waiting.remove(worker)
        if kind in ("joined", "arrived"):
            there.add(worker)
            untouched_late.discard(worker)
            waiting.append(worker)
        elif kind == "left":
            there.discard(worker)
        elif kind != "lost":
            send(worker, step)
        send_to_waiting(step)
    # A worker without any event is there from the start, so those that never came must come.
    for worker in sorted(untouched_late):
        events.append(TraceEvent(len(workers), "joined", worker))
        waiting.append(worker)
        send_to_waiting(len(workers))
    in_flight = [holds.get(worker, (-1, 0))[0] for worker in range(num_workers)]
    return workers, num_workers, events, held, in_flight, max_wait
