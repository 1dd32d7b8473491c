# %% [markdown]
# # Why was this run slow?
#
# A synchronous run on four equal workers takes longer than it should. This page records it,
# repeats it bit for bit from its journal, and finds out which worker is slow, what it waits for,
# and what would help.

# %%
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

from orlomo_jax import (
    HostBatches,
    ThreadWorkers,
    from_loss,
    make_method,
    per_worker_times,
    sample_trace,
    simulate,
    train,
)
from orlomo_jax.inspect import describe
from orlomo_jax.recording import Journal
from orlomo_jax.traces import fit_compute_times

plt.rcParams.update({"figure.figsize": (5.5, 3), "figure.dpi": 200})
plt.rcParams["figure.constrained_layout.use"] = True
K, S, T = 4, 16, 120  # workers, local steps in a round, reports in total

# %% [markdown]
# ## The run
#
# The batches come from files, so Python reads them: `HostBatches`. The cause is hidden in `read`:
# the disk of worker 2 is slow. Pretend that you have not seen it.

# %%
pixels, classes = load_digits(return_X_y=True)
pixels = (pixels / 16).astype(np.float32)


def read(worker, round):
    if worker == 2:
        time.sleep(0.06)
    chosen = np.random.default_rng([worker, round]).integers(0, len(classes), (S, 128))
    return pixels[chosen], classes[chosen]


@from_loss
def loss_fn(params, batch):
    x, y = batch
    logits = jax.nn.relu(x @ params["hidden"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


keys = jax.random.split(jax.random.key(0))
params = {
    "hidden": jax.nn.initializers.he_normal()(keys[0], (64, 512)),
    "out": jnp.zeros((512, 10)),
}
diloco = make_method("diloco", num_workers=K, num_local_steps=S)
settings = {"key": jax.random.key(1), "local_learning_rate": 0.05}

# %% [markdown]
# `journal` names the file in which `train` records the run: every report, with its time, and every
# event, such as a lost round. A run with a `Checkpointer` writes one anyway.

# %%
journal = Path(tempfile.mkdtemp()) / "arrivals.jsonl"
batches = HostBatches.of(read, prefetch=0)
real = train(
    diloco, loss_fn, batches, params, ThreadWorkers(), num_steps=T, journal=journal, **settings
)
print(real.health)

# %% [markdown]
# The line `share/idle` is the first clue. All workers have the same share, because DiLoCo waits
# for all of them in each round. But three of them are idle most of the time, and worker 2 hardly
# ever.

# %% [markdown]
# ## Repeat it
#
# From here on the workers are not needed. The journal is enough: `describe` shows what is in it
# (on the command line, `python -m orlomo_jax.inspect arrivals.jsonl`), and the simulator repeats
# the run from its trace, bit for bit. So what you find out is about the very run that was slow.

# %%
print(describe(journal).partition("  fingerprint")[0])

trace = Journal.load(journal).trace()
again = simulate(diloco, loss_fn, batches, params, trace=trace, engine="eager", **settings)
assert all((real.params[name] == again.params[name]).all() for name in params)
assert (real.history.loss == again.history.loss).all()
print("the replay has the same parameters and losses, bit for bit")

# %% [markdown]
# ## Which worker?
#
# In a synchronous trace a worker starts when the previous round of all workers has ended, and
# waits after its report for the last one. The timeline shows both, for a few rounds in the middle.

# %%
workers = np.arange(K)
starts = np.append(0, trace.times)[trace.dispatched_at]  # i reports came before
last = np.repeat(trace.times.reshape(-1, K).max(1), K)  # when the round of all workers ends
works, waits = trace.times - starts, last - trace.times

middle = slice(T // 2, T // 2 + 5 * K)
figure, axis = plt.subplots()
for seconds, begin, colour, label in (
    (works, starts, "tab:blue", "reads and computes"),
    (waits, trace.times, "0.85", "waits for the others"),
):
    axis.barh(
        trace.workers[middle],
        1000 * seconds[middle],
        left=1000 * (begin[middle] - starts[middle][0]),
        color=colour,
        edgecolor="white",
        label=label,
    )
axis.set(xlabel="milliseconds", ylabel="worker", yticks=workers)
axis.invert_yaxis()
figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2)
plt.show()

# %% [markdown]
# ## Which wait?
#
# Worker 2 is slow. Does it compute slowly, or does it wait for its data? A batch depends on worker
# and round only, so the same batches can be read again, with a clock. What is left of a round is
# computing. The first round of each worker is left out: it compiles.


# %%
def seconds_to_read(worker, round):
    begin = time.perf_counter()
    read(worker, round)
    return time.perf_counter() - begin


def mean_of(values, worker):
    return 1000 * values[(trace.workers == worker) & (trace.rounds > 0)].mean()


reads = np.array([seconds_to_read(*id) for id in zip(trace.workers, trace.rounds, strict=True)])
parts = {"reads": reads, "computes": works - reads, "waits for the others": waits}
means = {name: [mean_of(values, worker) for worker in workers] for name, values in parts.items()}
print("worker   " + "   ".join(means) + "   (milliseconds a round)")
for worker in workers:
    row = "   ".join(f"{means[name][worker]:{len(name)}.1f}" for name in means)
    print(f"{worker:6}   {row}")

# %%
figure, axis = plt.subplots()
below = np.zeros(K)
for (name, values), colour in zip(means.items(), ("tab:red", "tab:blue", "0.85"), strict=True):
    axis.bar(workers, values, bottom=below, color=colour, label=name)
    below += values
axis.set(xlabel="worker", ylabel="milliseconds a round", xticks=workers)
figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3)
plt.show()

# %% [markdown]
# That is the answer: worker 2 waits for its disk, and all others wait for worker 2.

# %% [markdown]
# ## What would help?
#
# `fit_compute_times` fits a model of the workers' speeds to the trace. With it, `sample_trace`
# predicts how long the same number of reports would take under other conditions.

# %%
fit = fit_compute_times(trace, S, skip_rounds=1)
print(fit)
fitted = fit.compute_times.mean_times(K)
others = float(np.median(fitted))
repaired = per_worker_times([min(mean, others) for mean in fitted])
for name, times, synchronous in (
    ("as it is", fit.compute_times, True),
    ("with a fast disk", repaired, True),
    ("asynchronous, with the slow disk", fit.compute_times, False),
):
    predicted = sample_trace(times, K, T, S, seed=0, synchronous=synchronous)
    print(f"{name:34} {predicted.times[-1]:5.2f} s")

# %% [markdown]
# A faster disk would help, and so would an asynchronous method, with the disk as it is: nobody
# waits for worker 2 any more. Reading ahead (`prefetch=2`) would not help much, because reading
# takes longer than all the rest of a round.
#
# OrLoMo on the same workers, for the same number of reports:

# %%
method = make_method("orlomo", num_workers=K, num_local_steps=S)
free = train(method, loss_fn, batches, params, ThreadWorkers(), num_steps=T, **settings)
assert real.status == again.status == free.status == "finished"
for name, run in (("DiLoCo", real), ("OrLoMo", free)):
    after_start = run.trace.times[-1] - run.trace.times[K - 1]
    print(f"{name}: {after_start:.2f} s after everybody's first report")

# %% [markdown]
# The price is delay: reports of worker 2 are computed from old parameters, and there are fewer of
# them. A method for asynchronous training is made for that.

# %%
figure, axis = plt.subplots()
is_slow = free.history.worker == 2
axis.hist(
    [free.history.delay[~is_slow], free.history.delay[is_slow]],
    bins=np.arange(free.history.delay.max() + 2) - 0.5,
    stacked=True,
    label=["others", "worker 2"],
)
axis.set(xlabel="delay of a report", ylabel="reports")
axis.legend()
plt.show()

# %% [markdown]
# More about journals and replay: [Checkpoints and replay](../checkpoints_and_replay.md). More
# about compute times: [Simulation](../simulate.md#compute-times-and-traces).
