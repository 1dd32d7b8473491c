# %% [markdown]
# # Your own model on unequal threads
#
# This page trains a Flax NNX module with BatchNorm and dropout on four real workers. Each is a
# thread of this process; the last one acts as if it were three times slower. Then it looks at how
# the run went: the health of the workers, a timeline, the loss and the delays.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from sklearn.datasets import load_digits

from orlomo_jax import Callback, ThreadWorkers, from_nnx, make_method, train

plt.rcParams.update({"figure.figsize": (5.5, 3), "figure.dpi": 200})
plt.rcParams["figure.constrained_layout.use"] = True
K, S = 4, 16  # workers, local steps in a round

# %% [markdown]
# ## The model
#
# `from_nnx` splits a module into parameters, model state (the statistics of BatchNorm) and a loss.
# The criterion returns the loss, and metrics to record if you like.


# %%
class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 512, rngs=rngs)
        self.norm = nnx.BatchNorm(512, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def criterion(net, batch):
    x, y = batch
    logits = net(x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, {"accuracy": (logits.argmax(-1) == y).mean()}


model = from_nnx(Net(nnx.Rngs(0)), criterion)

# %% [markdown]
# ## The data
#
# `batch_fn` returns the S batches of a round, here random digits. It runs on the worker, as a part
# of the compiled round. [Data](../host_data.md) shows how to read files instead.

# %%
pixels, classes = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(classes))
inputs, labels = jnp.asarray(pixels[order] / 16, jnp.float32), jnp.asarray(classes[order])


def batch_fn(key, worker, round):
    key = jax.random.fold_in(jax.random.fold_in(key, worker), round)
    chosen = jax.random.randint(key, (S, 128), 360, len(labels))  # the first 360 are for the test
    return inputs[chosen], labels[chosen]


# %% [markdown]
# ## The run
#
# `ThreadWorkers` starts one thread for each worker. `slowdowns` lets a worker sleep after each of
# its rounds, so that equal machines act as unequal ones; leave it out on machines that are
# unequal.
#
# A callback sees the run while it goes on. This one keeps what `on_health` tells it.


# %%
class HealthView(Callback):
    health_every = 0.25  # seconds

    def __init__(self):
        self.seen = []

    def on_health(self, health):
        self.seen.append(health)


view = HealthView()
result = train(
    make_method("orlomo", num_workers=K, num_local_steps=S),
    model.loss_fn,
    batch_fn,
    model.params,
    ThreadWorkers(slowdowns=[1, 1, 1, 3]),
    model_state=model.model_state,
    num_steps=300,
    key=jax.random.key(0),
    local_learning_rate=0.02,
    callbacks=[view],
)
assert result.status == "finished"
print(result.health)

# %% [markdown]
# ## The health of the workers
#
# `health` has each worker's share of the reports and how long it was idle. The slow worker has the
# smallest share, but it is not idle more often than the others: it just takes longer, and nobody
# waits for it. Most of the idle time is the start of the run, when programs are compiled.

# %%
health, workers = result.health, np.arange(K)
figure, (left, right) = plt.subplots(1, 2)
left.bar(workers, 100 * np.array(health.shares))
left.set(xlabel="worker", ylabel="share of the reports (%)", xticks=workers)
right.bar(workers, 100 * np.array(health.idle), color="tab:orange")
right.set(xlabel="worker", ylabel="idle (%)", xticks=workers, ylim=(0, 100))
plt.show()

# %% [markdown]
# The views of the callback show the speed during the run. The start is slow, because the first
# round compiles the program.

# %%
figure, axis = plt.subplots()
seen = [*view.seen, result.health]
axis.plot([x.seconds for x in seen], [x.step for x in seen], marker=".")
axis.set(xlabel="seconds", ylabel="reports applied")
axis.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## A timeline
#
# `result.trace` has the order and the times of all arrivals. Each bar is a round, from the moment
# at which its worker gets the parameters to its report. The colour is its delay: how many reports
# the server has applied in between.

# %%
trace = result.trace
starts = np.append(0, trace.times)[trace.dispatched_at]  # i reports came before
begin = np.percentile(trace.times, 50)
end = begin + 6 * np.median((trace.times - starts)[trace.workers == K - 1])
shown = (trace.times > begin) & (starts < end)
colours = ScalarMappable(Normalize(0, trace.delays[shown].max()), "viridis_r")
figure, axis = plt.subplots()
axis.barh(
    trace.workers[shown],
    1000 * (trace.times - starts)[shown],
    left=1000 * (starts[shown] - begin),
    color=colours.to_rgba(trace.delays[shown]),
    edgecolor="white",
)
axis.set(xlabel="milliseconds in the middle of the run", ylabel="worker", yticks=workers)
axis.set_xlim(0, 1000 * (end - begin))
axis.invert_yaxis()
figure.colorbar(colours, ax=axis, label="delay", ticks=range(0, trace.delays[shown].max() + 1, 2))
plt.show()

# %% [markdown]
# ## Loss against time
#
# `history` has one row for each report: the mean loss of its local steps, its metrics, its worker,
# its delay. The points are reports, the line is their running mean.

# %%
history = result.history
mean = np.convolve(history.loss, np.ones(20) / 20, mode="valid")
figure, axis = plt.subplots()
is_slow = history.worker == K - 1
axis.plot(history.time[~is_slow], history.loss[~is_slow], ".", alpha=0.3, label="fast workers")
axis.plot(history.time[is_slow], history.loss[is_slow], ".", label="slow worker")
axis.plot(history.time[19:], mean, color="black", linewidth=1)
axis.set(xlabel="seconds", ylabel="training loss", yscale="log")
axis.grid(alpha=0.3)
axis.legend()
plt.show()

# %% [markdown]
# ## Delays
#
# The reports of the slow worker are the oldest ones. OrLoMo gives a report that is more than 2K
# steps old less weight, and adds its momentum as if it had arrived in its own order.

# %%
figure, axis = plt.subplots()
axis.hist(
    [history.delay[~is_slow], history.delay[is_slow]],
    bins=np.arange(history.delay.max() + 2) - 0.5,
    stacked=True,
    label=["fast workers", "slow worker"],
)
axis.set(xlabel="delay of a report", ylabel="reports")
axis.legend()
plt.show()

# %% [markdown]
# ## The trained model
#
# `predict` runs the module in evaluation mode, with any parameters of its structure.

# %%
logits = jax.jit(model.predict)(result.params, result.model_state, inputs[:360])
accuracy = (logits.argmax(-1) == labels[:360]).mean()
print(f"test accuracy {accuracy:.1%}")
assert accuracy > 0.9

# %% [markdown]
# Next: [checkpoints](../checkpoints_and_replay.md) for a run that may be killed,
# [Ray](../real_workers.md#ray) for several hosts, and [a slow run, replayed](slow_run.py), to find
# out where the time goes.
