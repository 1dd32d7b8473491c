# %% [markdown]
# # Four methods under the same delays
#
# Eight workers train one small network on images of digits. Two of them are half as fast. Which
# method gets furthest in the same time? The simulator answers on one CPU within seconds. It
# computes every report from the very parameters that its worker was sent.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from sklearn.datasets import load_digits

from orlomo_jax import from_loss, heterogeneous, make_method, sample_trace, simulate

plt.rcParams.update({"figure.figsize": (5.5, 3), "figure.dpi": 200})
plt.rcParams["figure.constrained_layout.use"] = True
K, S, T = 8, 16, 480  # workers, local steps in a round, reports in total

# %% [markdown]
# ## The task
#
# scikit-learn comes with 1,797 digits of 8×8 pixels. The model is a plain function of `params`
# with one hidden layer.
#
# `batch_fn` returns the S batches of one round. It depends on its arguments only, so every method
# sees the same batches.

# %%
pixels, classes = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(classes))
inputs, labels = jnp.asarray(pixels[order] / 16, jnp.float32), jnp.asarray(classes[order])
test, train = (inputs[:360], labels[:360]), (inputs[360:], labels[360:])


def logits(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss(params, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def batch_fn(key, worker, round):
    key = jax.random.fold_in(jax.random.fold_in(key, worker), round)
    chosen = jax.random.randint(key, (S, 32), 0, len(train[1]))
    return train[0][chosen], train[1][chosen]


@jax.jit
def evaluate(params, model_state):
    hits = logits(params, test[0]).argmax(-1) == test[1]
    return {"training loss": loss(params, train), "test accuracy": 100 * hits.mean()}


he_normal, keys = jax.nn.initializers.he_normal(), jax.random.split(jax.random.key(0))
params = {
    "w1": he_normal(keys[0], (64, 64)),
    "b1": jnp.zeros(64),
    "w2": he_normal(keys[1], (64, 10)),
    "b2": jnp.zeros(10),
}

# %% [markdown]
# ## The workers
#
# `heterogeneous` describes the speeds: the last quarter of the workers takes twice as long.
# `sample_trace` draws from it who reports when. This order of arrivals is called a *trace*. All
# asynchronous methods get the same one.

# %%
times = heterogeneous(slow_fraction=0.25, slowdown=2.0, variation=0.2)
trace = sample_trace(times, K, T, S, seed=0)
slow = trace.workers >= 6  # reports of the two slow workers
print(f"{T} reports in {trace.times[-1]:.0f} virtual seconds; {slow.mean():.0%} from slow workers")


# %% [markdown]
# Each bar is a round, from the moment at which its worker gets the parameters to its report. The
# colour is the *delay*: how many reports the server has applied in between.


# %%
def timeline(trace, until):
    starts = np.append(0, trace.times)[trace.dispatched_at]  # i reports came before
    shown = starts < until
    colours = ScalarMappable(Normalize(0, trace.max_delay), "viridis_r")
    figure, axis = plt.subplots()
    axis.barh(
        trace.workers[shown],
        (trace.times - starts)[shown],
        left=starts[shown],
        color=colours.to_rgba(trace.delays[shown]),
        edgecolor="white",
    )
    axis.set(xlabel="virtual seconds", ylabel="worker", xlim=(0, until), yticks=range(K))
    axis.invert_yaxis()
    figure.colorbar(colours, ax=axis, label="delay", ticks=range(0, trace.max_delay, 3))
    plt.show()


timeline(trace, until=160)

# %% [markdown]
# A report of a fast worker is usually 5 to 7 steps old when it arrives, one of a slow worker about
# twice as old. What a method does with old reports is what makes the methods different.

# %%
figure, axis = plt.subplots()
axis.hist(
    [trace.delays[~slow], trace.delays[slow]],
    bins=np.arange(trace.max_delay + 2) - 0.5,
    stacked=True,
    label=["fast workers", "slow workers"],
)
axis.set(xlabel="delay of a report", ylabel="reports", xticks=range(0, trace.max_delay, 3))
axis.legend()
plt.show()

# %% [markdown]
# ## Four runs
#
# `make_method` returns a method by its name. Each gets the local learning rate γ that was best for
# it in the [quickstart of the experiments](../../README.md#results): the same data and a similar
# network, sixteen workers, a grid of five rates. PRSGDm is synchronous: `simulate` gives it a trace
# with the same compute times, in which all workers wait for each other.

# %%
rates = {"orlomo": 0.3, "prsgdm": 0.3, "al_sgd": 1.0, "local_ormo_da": 0.03}
results = {}
for name, rate in rates.items():
    results[name] = simulate(
        make_method(name, num_workers=K, num_local_steps=S),
        from_loss(loss),
        batch_fn,
        params,
        num_steps=T,
        compute_times=times,
        trace_seed=0,
        evaluate=evaluate,
        evaluate_every=16,
        key=jax.random.key(1),
        local_learning_rate=rate,
    )

print("method            γ   test accuracy   training loss   virtual seconds")
for name, result in results.items():
    last = result.history.evaluations[-1]
    loss_now, accuracy = last.metrics["training loss"], last.metrics["test accuracy"]
    print(f"{name:14} {rates[name]:4}  {accuracy:12.1f} %  {loss_now:14.5f}  {last.time:16.0f}")
assert all(result.status == "finished" for result in results.values())
assert results["orlomo"].trace == results["al_sgd"].trace == trace

# %% [markdown]
# ## Loss against time
#
# All runs apply the same number of reports. PRSGDm needs about twice the time for them, because in
# every round the fast workers wait for the slow ones. OrLoMo keeps the momentum and does not wait.

# %%
figure, axis = plt.subplots()
for (name, result), style in zip(results.items(), ("-", "--", "-.", ":"), strict=True):
    evaluations = result.history.evaluations
    values = [evaluation.metrics["training loss"] for evaluation in evaluations]
    axis.plot([evaluation.time for evaluation in evaluations], values, style, label=name)
axis.set(xlabel="virtual seconds", ylabel="training loss", yscale="log")
axis.grid(alpha=0.3)
axis.legend()
plt.show()

# %% [markdown]
# This is one seed of one small task. [Which method for my cluster?](../which_method.md) compares
# all methods on several clusters, and [Compare](../compare.md) shows how to do that for your own
# model.
