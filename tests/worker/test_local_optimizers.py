"""Local rounds of any optax transformation: against a plain loop, frozen, narrow, and refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orlomo_jax import (
    HostBatches,
    LocalUpdate,
    ParameterServer,
    Report,
    RestartEvery,
    cast_reports,
    dynamic_local_steps,
    from_loss,
    local_momentum_sgd,
    local_round,
    make_method,
    simulate,
)
from orlomo_jax.worker import LocalWorker, Workload
from tests.support import helpers

S = 3
PARAMS = {"w": jnp.array([[0.5, -1.0], [2.0, 0.25]]), "b": jnp.array([0.1, -0.2])}
BATCHES = jnp.linspace(-1, 1, S * 4 * 2).reshape(S, 4, 2)
loss_fn = from_loss(lambda params, x: jnp.mean((x @ params["w"] + params["b"] - jnp.sin(x)) ** 2))
MATRICES = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)  # noqa: E731
AS_MATRICES = lambda params: jax.tree.map(  # noqa: E731
    lambda x: optax.contrib.MuonDimensionNumbers(), params
)
OPTIMIZERS = {
    "adamw": optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1)),
    "clipped": optax.chain(optax.clip_by_global_norm(0.01), optax.scale_by_adam()),
    "muon": optax.partition(
        {
            2: optax.contrib.scale_by_muon(weight_dimension_numbers=AS_MATRICES),
            1: optax.scale_by_adam(),
        },
        lambda params: jax.tree.map(jnp.ndim, params),
    ),
    "lion": optax.scale_by_lion(),
    "masked": optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1, MATRICES)),
    "schedule": optax.chain(
        optax.scale_by_adam(), optax.scale_by_schedule(optax.linear_schedule(0.0, 1.0, 10))
    ),
    "sgd": optax.identity(),
    "plateau": optax.chain(
        optax.scale_by_adam(), optax.contrib.reduce_on_plateau(0.5, patience=1, rtol=0.9)
    ),
}


def plain_steps(optimizer, params, state, rate):
    for batch in BATCHES:
        loss, gradient = jax.value_and_grad(
            lambda p, batch=batch: loss_fn(p, None, batch, None)[0]
        )(params)
        direction, state = optax.with_extra_args_support(optimizer).update(
            gradient, state, params, value=loss
        )
        params = jax.tree.map(lambda w, d: w - rate * d, params, direction)
    return params, state


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("adamw", "masked") else pytest.mark.slow)
        for name in OPTIMIZERS
    ],
)
def test_two_rounds_are_a_plain_loop(name):
    optimizer = OPTIMIZERS[name]
    params = PARAMS
    round_fn, state = local_round(loss_fn, S, optimizer), optimizer.init(params)
    kept = None
    for start in (params, jax.tree.map(lambda x: x + 0.1, params)):
        result = round_fn(start, None, BATCHES, 0.05, jax.random.key(0), local_state=kept)
        end, state = plain_steps(optimizer, start, state, 0.05)
        kept = result.local_state
        delta = jax.tree.map(jnp.subtract, start, end)
        helpers.assert_trees_close(result.update.delta, delta, rtol=1e-4, atol=1e-6)
        assert result.update.momentum is None
        helpers.assert_trees_close(kept, state, rtol=1e-4, atol=1e-6)


def test_frozen_parameters_need_no_state():
    round_fn = local_round(
        loss_fn, S, OPTIMIZERS["adamw"], frozen={"w": True, "b": False}, keep_state=True
    )
    result = round_fn(PARAMS, None, BATCHES, 0.05, jax.random.key(0))
    assert not result.update.delta["w"].any()
    assert result.update.delta["b"].all()
    moments = [x.shape for x in jax.tree.leaves(result.local_state) if x.ndim]
    assert moments == [(2,), (2,)]


def test_the_optimizer_of_a_narrow_model_is_in_float32():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    round_fn = local_round(loss_fn, S, optax.scale_by_adam())
    result = round_fn(narrow, None, BATCHES, 1e-4, jax.random.key(0))
    wide = {x.dtype for x in jax.tree.leaves((result.update, result.local_state)) if x.ndim}
    assert wide == {jnp.dtype(jnp.float32)}
    assert result.update.delta["w"].all()  # in bfloat16, steps of 1e-4 would be lost


def test_reports_can_be_cast_and_the_state_kept():
    cast = cast_reports(local_round(loss_fn, S, optax.scale_by_adam()), jnp.bfloat16)
    worker = LocalWorker(
        Workload.of(cast, lambda key, worker, round: BATCHES, jax.random.key(0)), 0
    )
    server = ParameterServer(make_method("al_sgd", 1, S), PARAMS, local_learning_rate=0.05)
    for round in range(3):
        worker.run(round, server.to_send(), fresh=round == 0)
    assert int(worker.local_state(2).count) == 3 * S
    with pytest.raises(KeyError):
        worker.local_state(0)


def negated(inner):
    return optax.chain(inner, optax.scale(-1.0))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(0.1),
        optax.sgd(0.1),
        negated(optax.scale_by_lion()),
        optax.adam(optax.linear_schedule(0.0, 1.0, 10)),  # its first step is 0
    ],
    ids=["adamw", "sgd", "lion", "warmup"],
)
def test_a_descent_direction_is_refused(optimizer):
    with pytest.raises(ValueError, match="`optimizer` must return an ascent direction"):
        local_round(loss_fn, S, optimizer)
    with pytest.raises(ValueError, match="`optimizer` must return an ascent direction"):
        make_method("al_sgd", 2, S, local_optimizer=optimizer)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: jax.tree.map(jnp.sum, x), r"`the result of .*\['b'\]` must have shape \(2,\)"),
        (lambda x: {"w": x["w"]}, "`the result of .*` must have the structure"),
        (lambda x: None, "`the result of .*` must have the structure"),
    ],
    ids=["shapes", "structure", "nothing"],
)
def test_a_result_unlike_the_gradient_is_refused(result, message):
    """A scalar would be broadcast."""
    wrong = optax.GradientTransformation(lambda p: (), lambda u, s, p=None: (result(u), s))
    for round_fn in (
        local_round(loss_fn, S, wrong),
        local_momentum_sgd(loss_fn, S, gradient_transform=wrong),
    ):
        with pytest.raises(ValueError, match=message):
            round_fn(PARAMS, None, BATCHES, 0.1, jax.random.key(0))


def test_an_optimizer_that_needs_more_than_the_loss_is_refused():
    search = optax.scale_by_backtracking_linesearch(5)
    with pytest.raises(TypeError, match=r"`optimizer` must not need .* 'grad' and 'value_fn'"):
        make_method("al_sgd", 2, S, local_optimizer=search)


def growing(params, form):
    def update(updates, state, params=None):
        return updates, form(state)

    return optax.GradientTransformation(lambda p: {"count": jnp.zeros(2)}, update)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda state: {**state, "more": jnp.zeros(1)}, "must keep its structure"),
        (lambda state: {"count": jnp.zeros(3)}, r"must keep its shapes, got \(3,\)"),
    ],
)
def test_a_state_that_changes_its_form_is_refused(form, message):
    round_fn = local_round(loss_fn, S, growing(PARAMS, form))
    with pytest.raises(ValueError, match=message):
        round_fn(PARAMS, None, BATCHES, 0.1, jax.random.key(0))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("orlomo", 2, S), {"local_optimizer": optax.identity()}, "`local_optimizer` must be None"),
        (("prsgdm", 2, S), {"local_optimizer": optax.identity()}, "`local_optimizer` must be None"),
        (("al_sgd", 2, S), {"local_optimizer": "adam"}, "`optimizer` must be an optax"),
        (("al_sgd", 2, (1, 0)), {}, r"`num_local_steps\[1\]` must be ≥ 1"),
        (("al_sgd", 2, (1, 2, 3)), {}, "`num_local_steps` must have a number for each of 2"),
        (("al_sgd", 2, ()), {}, "`num_local_steps` must have a number for each of 2"),
        (("ringmaster", 2, S), {}, "`ringmaster` needs the hyperparameter max_delay"),
        (("ringmaster", 2, S), {"max_delay": 0}, r"`max_delay` must be in \[1, "),
        (("rennala", 2, S), {"buffer_size": 0}, "`buffer_size` must be ≥ 1"),
        (("delayed_nesterov", 2, S), {"buffer_size": 0}, "`buffer_size` must be ≥ 1"),
        (("diloco", 2, S), {"policy": RestartEvery(2)}, "`policy` must be None for diloco"),
        (("fedavgm", 2, S), {"beta": 0.5}, "`fedavgm` takes the hyperparameters momentum"),
    ],
)
def test_bad_arguments_of_a_method(arguments, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_method(*arguments, **options)


def test_speeds_must_be_positive():
    with pytest.raises(ValueError, match="speeds"):
        dynamic_local_steps([1.0, 0.0], S)


@pytest.mark.parametrize(
    "batch_fn",
    [
        lambda key, worker, round, num_steps: jnp.ones((num_steps + 5, 4, 2)),
        lambda key, worker, round, num_steps: jnp.ones((3, 4, 2)),  # S of the other worker
        HostBatches.of(lambda worker, round: np.ones((3, 4, 2), np.float32)),
    ],
)
def test_batches_must_have_a_workers_number_of_steps(batch_fn):
    method = make_method("al_sgd", 2, (2, 3))
    with pytest.raises(ValueError, match="must have a leading axis of num_local_steps=2"):
        simulate(
            method,
            loss_fn,
            batch_fn,
            PARAMS,
            num_steps=4,
            key=jax.random.key(0),
            local_learning_rate=0.1,
        )


def test_a_rule_that_declines_leaves_everything_but_the_step():
    method = make_method("ringmaster", 2, 1, max_delay=1)
    method = method.with_rule(optax.chain(method.rule, optax.scale_by_adam()))
    server = ParameterServer(method, PARAMS, {"mean": jnp.ones(2)}, local_learning_rate=0.1)
    tasks = [server.dispatch(worker) for worker in range(2)]
    ones = LocalUpdate(jax.tree.map(jnp.ones_like, PARAMS))
    server.receive(Report(tasks[0].id, ones, {"mean": jnp.zeros(2)}))
    before = jax.tree.map(np.array, server.state)
    server.receive(Report(tasks[1].id, ones, {"mean": jnp.zeros(2)}))
    after = server.state
    assert not after.accepted
    assert int(after.version) == int(before.version) == 1
    helpers.assert_trees_equal(after.params, before.params)
    helpers.assert_trees_equal(after.model_state, before.model_state)
    helpers.assert_trees_equal(after.rule_state[1], before.rule_state[1])
    assert int(after.rule_state[0].step) == int(before.rule_state[0].step) + 1 == server.step
