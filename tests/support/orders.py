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
def eventful_runs(draw):
    """Draw a run by walking through it, and what a server would have noted beside each report."""
    num_workers = draw(st.integers(1, 5))
    late = draw(st.sets(st.integers(0, num_workers - 1)))
    holds = {worker: (0, 0) for worker in range(num_workers) if worker not in late}
    there, untouched_late = set(holds), set(late)
    next_round = {worker: int(worker in there) for worker in range(num_workers)}
    workers, held, events = [], [], []
    for _ in range(draw(st.integers(0, 30))):
        step = len(workers)
        worker = draw(st.integers(0, num_workers - 1))
        if worker not in there:
            kind = "joined"
        elif worker not in holds:
            kind = draw(st.sampled_from(["redispatched", "left"]))
        else:
            kind = draw(st.sampled_from(["arrived", "arrived", "lost", "left"]))
        if kind == "arrived":
            workers.append(worker)
            held.append(holds[worker])
        else:
            events.append(TraceEvent(step, kind, worker))
        if kind in ("left", "lost"):
            holds.pop(worker, None)
            there -= {worker} if kind == "left" else set()
        else:
            there.add(worker)
            untouched_late.discard(worker)
            holds[worker] = (step + (kind == "arrived"), next_round[worker])
            next_round[worker] += 1
    # A worker without any event is there from the start, so those that never came must come.
    for worker in sorted(untouched_late):
        events.append(TraceEvent(len(workers), "joined", worker))
        holds[worker] = (len(workers), 0)
    in_flight = [holds.get(worker, (-1, 0))[0] for worker in range(num_workers)]
    return workers, num_workers, events, held, in_flight
