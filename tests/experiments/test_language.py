"""The language experiment: model, text, batches, and training compared with plain loops."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.comparison.clusters import ALL_METHODS, DEFAULTS
from experiments.language import optimizers, text
from experiments.language.model import SIZES, GPTConfig, network
from experiments.language.parts import WITH_MOMENTUM, LanguageRun, assemble
from orlomo_jax import simulate_many

TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Fifty files with 100 to 300 bytes each; every file has its own byte."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    for number in range(50):
        words = generator.choice([b"ab", b"cd ", b"e\n", bytes([128 + number])], 120)
        (folder / f"{number:02}.txt").write_bytes(b"".join(words)[: 100 + 4 * number])
    return folder


def simulated(run: LanguageRun):
    parts = assemble(run)
    start = parts.start
    (result,) = simulate_many(
        *(parts.method, None, parts.batch_fn, [start]),
        round_fn=parts.round_fn,
        evaluate=parts.evaluate,
        over_runs="loop",
    )
    return parts, result


@pytest.mark.parametrize("name", ["tiny", "0.1m"])
def test_the_number_of_parameters_and_the_shape_of_logits(name):
    config = SIZES[name]
    model = network(config)
    params = model.init(jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == config.num_parameters
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits = model.logits(params, jnp.zeros((3, config.context), jnp.uint8))
    assert logits.shape == (3, config.context, 256)
    assert logits.dtype == jnp.float32


def test_the_first_loss_is_that_of_a_uniform_guess():
    model = network(TINY)
    params = model.init(jax.random.key(0))
    windows = jax.random.randint(jax.random.key(1), (64, 9), 0, 256).astype(jnp.uint8)
    loss, (state, metrics) = jax.jit(model.loss_fn)(params, {}, windows, jax.random.key(0))
    assert abs(float(loss) - np.log(256)) < 0.1
    assert (state, metrics) == ({}, {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_later_byte_does_not_change_earlier_logits(dtype):
    model = network(GPTConfig(layers=2, heads=2, width=16, context=8, dtype=dtype))
    params = model.init(jax.random.key(0))
    line = jnp.arange(8, dtype=jnp.uint8)[None]
    one, other = (np.asarray(model.logits(params, x)) for x in (line, line.at[0, 5].set(99)))
    np.testing.assert_array_equal(one[:, :5], other[:, :5])
    assert np.abs(one[:, 5:] - other[:, 5:]).max(axis=(0, 2)).min() > 0


@pytest.mark.slow
def test_bfloat16_is_close_to_float32():
    logits = []
    for dtype in ("float32", "bfloat16"):
        model = network(GPTConfig(layers=2, heads=2, width=32, context=8, dtype=dtype))
        logits.append(model.logits(model.init(jax.random.key(0)), jnp.ones((1, 8), jnp.uint8)))
    assert 0 < float(jnp.abs(logits[0] - logits[1]).max()) < 0.02


def test_bad_shapes_of_a_model():
    with pytest.raises(ValueError, match="`width` must be a multiple of heads=3, got width=16"):
        GPTConfig(width=16, heads=3)
    with pytest.raises(ValueError, match="`layers` must be an integer ≥ 1, got layers=0"):
        GPTConfig(layers=0)
    with pytest.raises(ValueError, match=r"`dtype` must be auto, .*, got dtype='int8'"):
        GPTConfig(dtype="int8")  # pyright: ignore
    model = network(TINY)
    with pytest.raises(ValueError, match="`text` must have at most context=8 bytes"):
        model.logits(model.init(jax.random.key(0)), jnp.zeros((1, 9), jnp.uint8))


def test_whole_files_are_held_out_and_always_the_same(corpus, tmp_path):
    loaded = text.load((corpus,))
    own = lambda part: {x for x in part.tolist() if x >= 128}  # noqa: E731  # the files in a part
    assert own(loaded.train)
    assert own(loaded.held_out)
    assert not own(loaded.train) & own(loaded.held_out)
    everything = sum(len(file.read_bytes()) for file in corpus.iterdir())
    assert len(loaded.train) + len(loaded.held_out) == everything
    assert 0.02 < len(loaded.held_out) / everything <= 0.05
    for file in corpus.iterdir():  # another place gives the same split
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "binary").write_bytes(b"\0\1")
    (tmp_path / "empty").touch()
    again = text.load((tmp_path,))
    assert again.digest == loaded.digest
    np.testing.assert_array_equal(again.held_out, loaded.held_out)


def test_a_file_given_twice_is_read_once(corpus):
    assert text.load((corpus, corpus / "07.txt", corpus)).digest == text.load((corpus,)).digest


def test_the_standard_library_is_the_default():
    loaded = text.load()
    assert len(loaded.train) > 5_000_000
    assert 0.04 < len(loaded.held_out) / (len(loaded.train) + len(loaded.held_out)) <= 0.05
    assert loaded is text.load()


@pytest.mark.parametrize("kind", text.SHARDS)
def test_batches_depend_on_worker_and_round_and_stay_in_their_shard(corpus, kind):
    loaded = text.load((corpus,))
    K, context = 3, 8
    bounds = text.shards(loaded, K, kind, context)
    draw = text.batches((corpus,), kind, K, 4, 5, context)
    assert draw is text.batches((corpus,), kind, K, 4, 5, context)
    key = jax.random.key(3)
    drawn = {(w, r): np.asarray(draw(key, w, r)) for w in range(K) for r in range(2)}
    for (worker, round), windows in drawn.items():
        assert windows.shape == (4, 5, context + 1)
        assert windows.dtype == np.uint8
        np.testing.assert_array_equal(windows, draw(key, jnp.int32(worker), jnp.int32(round)))
        begin, end = bounds[worker]
        part = loaded.train[begin:end].tobytes()
        assert all(line.tobytes() in part for line in windows.reshape(-1, context + 1))
    assert len({x.tobytes() for x in drawn.values()}) == len(drawn)
    assert draw(key, 0, 0, 2).shape == (2, 5, context + 1)  # S may differ between workers


def test_the_first_and_the_last_window_of_a_shard_are_drawn(corpus):
    """A shard of context + 3 bytes has three windows."""
    part = text.load((corpus,)).train
    draw = text._drawing(200, 1, 8)  # pyright: ignore
    windows = np.asarray(draw(part, jnp.array([[5, 5 + 11]]), jax.random.key(0), 0, 0))
    wanted = {part[i : i + 9].tobytes() for i in (5, 6, 7)}
    assert {line.tobytes() for line in windows[:, 0]} == wanted


def test_sizes_of_shards(corpus):
    loaded = text.load((corpus,))
    total = len(loaded.train)
    assert (text.shards(loaded, 4, "shared", 8) == [0, total]).all()
    for kind in ("disjoint", "unequal"):
        bounds = text.shards(loaded, 4, kind, 8)
        assert bounds[0, 0] == 0
        assert bounds[-1, 1] == total
        np.testing.assert_array_equal(bounds[1:, 0], bounds[:-1, 1])
        sizes = bounds[:, 1] - bounds[:, 0]
        wanted = np.ones(4) / 4 if kind == "disjoint" else np.arange(1, 5) / 10
        np.testing.assert_allclose(sizes / total, wanted, atol=0.03)
    assert set(bounds[:, 1]) <= set(loaded.file_ends.tolist())


def test_bad_texts(corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match="`text` must name files or folders that exist"):
        text.load((tmp_path / "missing",))
    with pytest.raises(
        ValueError, match=r"`text` must have two or more text files.* got 1 in .*07"
    ):
        text.load((corpus / "07.txt",))
    with pytest.raises(ValueError, match=r"`text` must have two or more text files.* got 0 in "):
        text.load((tmp_path,))
    loaded = text.load((corpus,))
    with pytest.raises(ValueError, match=r"`shards` must be one of shared, .* got shards='iid'"):
        text.shards(loaded, 2, "iid", 8)  # pyright: ignore
    with pytest.raises(ValueError, match=r"at least context \+ 1 = 101 bytes, got 100 for worker"):
        text.shards(loaded, 90, "disjoint", 100)
    with pytest.raises(ValueError, match="got 0 for worker 1 of 200 with shards='unequal'"):
        text.shards(loaded, 200, "unequal", 8)
    with pytest.raises(ValueError, match=r"held-out files of at least context \+ 1 = 2001 bytes"):
        text.held_out_windows(loaded, 2000)


def test_the_evaluation_is_the_mean_over_held_out_windows(corpus):
    loss_fn = lambda params, state, windows, key: (params * windows.mean(), (state, {}))  # noqa: E731
    evaluate = text.evaluation((corpus,), 8, loss_fn)
    windows = text.held_out_windows(text.load((corpus,)), 8)
    assert len(windows) * 8 >= text.EVALUATED_BYTES
    assert float(evaluate(2.0, {})["loss"]) == pytest.approx(2 * windows.mean(), rel=1e-5)


def test_the_schedule_of_a_run():
    rates = [float(optimizers.schedule(0.5, 0.1, 100)(step)) for step in range(101)]
    np.testing.assert_allclose(rates[:10], 0.5 * np.arange(1, 11) / 10, rtol=1e-6)
    wanted = optax.cosine_decay_schedule(0.5, 90, alpha=0.1)
    np.testing.assert_allclose(rates[10:], [wanted(step) for step in range(91)], rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sgd"}, "`method` must be one of orlomo, .*, got method='sgd'"),
        ({"optimizer": "lion"}, "`optimizer` must be one of adamw, muon, momentum, got"),
        ({"size": "2m"}, "`size` must be one of tiny, 0.1m, 1m, 10m, 35m, got size='2m'"),
        ({"num_reports": 0}, "`num_reports` must be an integer ≥ 1, got num_reports=0"),
        ({"num_reports": 3}, "`num_gradients` must give each of 4 workers a report"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be finite and ≥ 0, got"),
        ({"server_momentum": 1.0}, r"`server_momentum` must be in \[0, 1\), got"),
        ({"method": "fedbuff", "server_momentum": 0.5}, "`server_momentum` must be None for fedb"),
        ({"method": "prsgdm", "server_learning_rate": 1}, "`server_learning_rate` must be None"),
        ({"workers": 3}, "`workers` must be 4 for the cluster 'forgather_4to1', got workers=3"),
        ({"compute_times": "slow"}, "`compute_times` must be of equal, .*, got compute_times="),
        ({"speeds": (1.0, 0.0)}, "`speeds` must be finite and > 0, got speeds="),
        ({"local_steps": "many"}, "`local_steps` must be an integer, dynamic or dynamic:N"),
        ({"warmup": 2.0}, r"`warmup` must be in \[0, 1\], got warmup=2.0"),
        ({"runtime": "mpi"}, "`runtime` must be one of simulated, threads, ray, got"),
    ],
)
def test_bad_settings(corpus, settings, message):
    with pytest.raises(ValueError, match=message):
        assemble(LanguageRun(**{"size": "tiny", "text": (corpus,)} | settings))


@pytest.mark.slow
def test_one_worker_with_one_step_is_a_plain_adamw_loop(corpus):
    run = LanguageRun(
        *("al_sgd", 0.01),
        size="tiny",
        text=(corpus,),
        speeds=(1.0,),
        local_steps="1",
        num_reports=8,
        weight_decay=0.1,
        clip=0.5,
    )
    parts, result = simulated(run)
    start = parts.start
    rate = optax.warmup_cosine_decay_schedule(0.01, 0.01, 1, 8, end_value=0.001)
    adamw = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(
            rate, 0.9, 0.95, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim == 2, p)
        ),
    )
    params, state = start.params, adamw.init(start.params)

    @jax.jit
    def step(params, state, windows):
        loss = lambda p: parts.loss_fn(p, {}, windows, jax.random.key(0))[0]  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = adamw.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for round in range(8):
        (windows,) = parts.batch_fn(jax.random.split(start.key)[0], 0, round)
        params, state, loss = step(params, state, windows)
        losses.append(float(loss))
    np.testing.assert_allclose(result.history.loss, losses, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(result.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.slow
def test_synchronous_diloco_is_a_plain_loop_over_workers(corpus):
    """The workers keep their AdamW states; the server takes Nesterov steps, η 0.7 and μ 0.9."""
    K, S, rounds = 2, 3, 3
    run = LanguageRun(
        *("diloco", 0.01),
        size="tiny",
        text=(corpus,),
        shards="disjoint",
        compute_times="equal",
        workers=K,
        local_steps=str(S),
        num_reports=K * rounds,
        warmup=0.0,
    )
    parts, result = simulated(run)
    start = parts.start
    local = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim == 2, p)),
    )

    @jax.jit
    def local_steps(params, state, batches, rate):
        for windows in batches:
            loss = lambda p: parts.loss_fn(p, {}, windows, jax.random.key(0))[0]  # noqa: E731, B023
            direction, state = local.update(jax.grad(loss)(params), state, params)
            params = jax.tree.map(lambda w, d: w - rate * d, params, direction)
        return params, state

    params, states = start.params, [local.init(start.params)] * K
    buffer = jax.tree.map(jnp.zeros_like, params)
    for round in range(rounds):
        rate, deltas = start.local_learning_rate(K * round), []
        for worker in range(K):
            batches = parts.batch_fn(jax.random.split(start.key)[0], worker, round)
            ended, states[worker] = local_steps(params, states[worker], batches, rate)
            deltas.append(jax.tree.map(jnp.subtract, params, ended))
        mean = jax.tree.map(lambda *x: sum(x) / K, *deltas)
        buffer = jax.tree.map(lambda u, d: 0.9 * u + d, buffer, mean)
        params = jax.tree.map(lambda w, u, d: w - 0.7 * (0.9 * u + d), params, buffer, mean)
    assert result.trace.num_steps == K * rounds
    for x, y in zip(jax.tree.leaves(result.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.slow
def test_runs_that_differ_in_seed_and_rates_share_a_sweep(corpus):
    settings = {"size": "tiny", "text": (corpus,), "local_steps": "2", "num_reports": 8}
    runs = [
        LanguageRun(seed=seed, learning_rate=rate, server_learning_rate=eta, **settings)
        for seed, rate, eta in ((0, 0.01, 1.0), (1, 0.02, 0.5))
    ]
    first, second = map(assemble, runs)
    assert first.method == second.method
    assert first.round_fn is second.round_fn
    assert first.batch_fn is second.batch_fn
    assert first.evaluate is second.evaluate
    options = {"evaluate": first.evaluate, "round_fn": first.round_fn}
    together = simulate_many(
        *(first.method, None, first.batch_fn, [first.start, second.start]), **options
    )
    _, alone = simulated(runs[1])
    losses = [result.history.evaluations[-1].metrics["loss"] for result in (together[1], alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "momentum"])
def test_other_optimizers_learn(corpus, name):
    run = LanguageRun(
        size="tiny", text=(corpus,), local_steps="dynamic:4", num_reports=30, optimizer=name
    )
    history = simulated(run)[1].history
    assert history.loss[-5:].mean() < history.loss[:5].mean() - 0.3


@pytest.mark.parametrize("method", ALL_METHODS)
def test_every_method_is_assembled_with_its_settings(corpus, method):
    eta = None if DEFAULTS[method].rate is None else 0.375
    mu = 0.8125 if method in WITH_MOMENTUM else None
    settings = {"size": "tiny", "text": (corpus,), "local_steps": "2", "num_reports": 8}
    run = LanguageRun(method, server_learning_rate=eta, server_momentum=mu, **settings)
    parts = assemble(run)
    chosen = parts.method
    if parts.start.hyperparameters:
        chosen = chosen.with_hyperparameters(**parts.start.hyperparameters)
    values = " ".join(text for _, text in chosen.fingerprint)
    assert eta is None or "0.375" in values
    assert mu is None or "0.8125" in values
    assert (chosen.local_optimizer is None) == (method in ("orlomo", "prsgdm"))


def test_uneven_local_steps_have_the_same_budget_of_tokens(corpus):
    for steps in ("8", "dynamic:8"):
        settings = {"size": "tiny", "text": (corpus,), "local_steps": steps, "num_reports": 40}
        parts = assemble(LanguageRun(**settings))
        done = np.array(parts.method.steps_of_worker)[parts.start.trace.workers].sum()
        assert 8 * 40 - 8 <= done <= 8 * 40
