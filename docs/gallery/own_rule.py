# %% [markdown]
# # Your own rule, checked
#
# A server rule is an optax transformation from a worker's report to an update of the parameters.
# This page writes one that has its own state, shows that it helps when a worker sends nonsense,
# and runs it through the checks of the theory. The checks also find a slip that training hardly
# shows.

# %%
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import proofs_check
from orlomo_jax import Method, from_loss, make_method, orlomo, register_method, simulate
from orlomo_jax.rules import OrLoMoState

plt.rcParams.update({"figure.figsize": (5.5, 3), "figure.dpi": 200})
plt.rcParams["figure.constrained_layout.use"] = True
K, S, T = 8, 8, 480  # workers, local steps in a round, reports in total

# %% [markdown]
# ## The rule
#
# The rule is OrLoMo with *trust*. Each worker has a number in [0, 1], which starts at 1 and
# follows how often the worker's reports point in the direction of the server's momentum u:
#
# $$c_k \leftarrow (1 - \alpha)\, c_k + \alpha\, [\langle \Delta u, u \rangle \ge 0]$$
#
# The server multiplies the report by $c_k$. The numbers are an array with a leading axis of K in
# the rule's state, so checkpoints save them with everything else.


# %%
class TrustState(NamedTuple):
    step: jax.Array  # t, int32[]
    momentum: Any  # u_t, a tree like params
    trust: jax.Array  # c, float[K]


def trusting_orlomo(
    num_workers, momentum=0.9, learning_rate=1.0, delay_weight=None, *, caution=0.05
):
    inner = orlomo(num_workers, momentum, learning_rate, delay_weight)

    def init(params):
        return TrustState(*inner.init(params), jnp.ones(num_workers))

    def update(report, state, params=None, *, dispatched_at, worker, **extra_args):
        agrees = optax.tree.vdot(report.momentum, state.momentum) >= 0
        trust = (1 - caution) * state.trust[worker] + caution * agrees
        report = jax.tree.map(lambda x: (trust * x).astype(x.dtype), report)  # Δw and Δu
        updates, inner_state = inner.update(
            report, OrLoMoState(*state[:2]), params, dispatched_at=dispatched_at
        )
        return updates, TrustState(*inner_state, state.trust.at[worker].set(trust))

    return optax.GradientTransformationExtraArgs(init, update)


# %% [markdown]
# ## The method
#
# A method is a rule with K, S and what the workers do. `register_method` gives it a name, and from
# then on it works wherever a method works.


# %%
def trusting_method(num_workers, num_local_steps, momentum=0.9, caution=0.05):
    rule = trusting_orlomo(num_workers, momentum, caution=caution)
    return Method("trusting", rule, num_workers, num_local_steps, worker_momentum=momentum)


register_method("trusting", trusting_method)

# %% [markdown]
# ## Does it help?
#
# Two of the eight workers have a broken file of labels: every label is one too large. The server
# does not know this.

# %%
pixels, classes = load_digits(return_X_y=True)
inputs, labels = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(classes)


def logits(params, x):
    return jax.nn.relu(x @ params["hidden"]) @ params["out"]


def loss(params, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def batch_fn(key, worker, round):
    key = jax.random.fold_in(jax.random.fold_in(key, worker), round)
    chosen = jax.random.randint(key, (S, 32), 0, len(labels))
    broken = jnp.where(worker >= K - 2, 1, 0)
    return inputs[chosen], (labels[chosen] + broken) % 10


@jax.jit
def evaluate(params, model_state):
    return {"loss": loss(params, (inputs, labels))}


params = {
    "hidden": jax.nn.initializers.he_normal()(jax.random.key(0), (64, 64)),
    "out": jnp.zeros((64, 10)),
}


def run(name, num_steps=T):
    return simulate(
        make_method(name, num_workers=K, num_local_steps=S),
        from_loss(loss),
        batch_fn,
        params,
        num_steps=num_steps,
        evaluate=evaluate,
        evaluate_every=16,
        key=jax.random.key(1),
        local_learning_rate=0.1,
    )


results = {name: run(name) for name in ("orlomo", "trusting")}

# %%
figure, axis = plt.subplots()
for name, result in results.items():
    evaluations = result.history.evaluations
    values = [evaluation.metrics["loss"] for evaluation in evaluations]
    axis.plot([evaluation.time for evaluation in evaluations], values, label=name)
axis.set(xlabel="virtual seconds", ylabel="loss on the right labels")
axis.grid(alpha=0.3)
axis.legend()
plt.show()
final = {name: result.history.evaluations[-1].metrics["loss"] for name, result in results.items()}
assert final["trusting"] < final["orlomo"]

# %% [markdown]
# ## The rule's state
#
# `result.rule_state` is the state at the end. A shorter run is the beginning of a longer one, so a
# few runs of different lengths show how trust develops.

# %%
lengths = range(40, T + 1, 40)
trust = np.array([np.ones(K), *(run("trusting", length).rule_state.trust for length in lengths)])
figure, axis = plt.subplots()
for worker in range(K):
    is_broken = worker >= K - 2
    colour, label = ("tab:red", "wrong labels") if is_broken else ("tab:blue", "right labels")
    label = label if worker in (0, K - 1) else None
    axis.plot([0, *lengths], trust[:, worker], color=colour, label=label)
axis.set(xlabel="step of the server", ylabel="trust", ylim=(0, 1.05))
axis.grid(alpha=0.3)
axis.legend()
plt.show()
assert trust[-1, -2:].max() < trust[-1, :-2].min()

# %% [markdown]
# ## Through the checks
#
# `proofs_check.check` runs the checks of Lemmas 1, 2, 3 and 9 on a rule: is it *ordered momentum*?
# The lemmas speak of reports as the workers sent them. So the factory for the checks turns the
# trust off; what is checked is everything else. `size` keeps it short here: every order of four
# reports of two workers, and one example of each random check. Without it, the checks try many
# more cases.


# %%
def without_caution(num_workers, momentum, learning_rate, delay_weight):
    return trusting_orlomo(num_workers, momentum, learning_rate, delay_weight, caution=0.0)


def show(outcomes):
    for outcome in outcomes:
        verdict = "holds" if outcome.passed else "FAILS"
        print(f"{outcome.statement:9}{outcome.check:14}{outcome.cases:4} cases  {verdict}")


small = proofs_check.Size(examples=1, exhaustive=((2, 4),))
outcomes = proofs_check.check(without_caution, size=small)
show(outcomes)
assert all(outcome.passed for outcome in outcomes)


# %% [markdown]
# ## A slip, caught
#
# It is easy to forget the delay. This rule passes the server's own step instead of the step at
# which the worker was sent its parameters. It is jitted, it trains, and the loss goes down. But
# momentum is not in order any more. One random run is too short to show it; the exhaustive check
# finds it, and searches for the smallest run that fails.


# %%
def forgetful(num_workers, momentum, learning_rate, delay_weight):
    inner = orlomo(num_workers, momentum, learning_rate, delay_weight)

    def update(report, state, params=None, *, dispatched_at, **extra_args):
        return inner.update(report, state, params, dispatched_at=state.step)  # the slip

    return optax.GradientTransformationExtraArgs(inner.init, update)


outcomes = proofs_check.check(forgetful, size=small, statements=["lemma-9"])
show(outcomes)
failed = next(outcome for outcome in outcomes if not outcome.passed)
print(failed.counterexample)

# %% [markdown]
# Two reports are enough. Worker 1 reports second, one group late. With β = 0 nothing of its
# momentum should be left by then, but the slip adds all of it.

# %% [markdown]
# On the command line, `python -m proofs_check --rule my_module:my_rule` does the same and can
# write the counterexample to a file. [Write a rule](../custom_rule.md) has the contract of a rule,
# and [Verification](../verification.md) what each check does.
