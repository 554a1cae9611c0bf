"""The compiled training step against float64 and PyTorch's autograd."""

from __future__ import annotations

import math

import pytest
import torch

from onelaunch.config import ModelConfig, RopeScaling, YarnRopeScaling
from onelaunch.engines.cpu.training import batch as batches
from onelaunch.engines.cpu.training import engine
from onelaunch.engines.cpu.training.engine import CpuTrainer
from onelaunch.engines.cpu.training.layout import Kind
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput
from onelaunch.model import Model
from tests.engines.suite import weights_of

pytestmark = pytest.mark.usefixtures("compiled_training")

BASE = ModelConfig(
    dim=48, n_layers=2, n_heads=4, hidden_dim=80, vocab_size=131, max_seq_len=256, head_dim=12
)
SHAPES = {
    "plain": BASE,
    "gqa-interleaved": BASE.with_(n_kv_heads=2, rope_layout="interleaved"),
    "one-kv-head-untied": BASE.with_(n_kv_heads=1, tied_embeddings=False),
    "qk-norm": BASE.with_(qk_norm=True, n_kv_heads=2, head_dim=16, norm_eps=1e-6),
    "no-power-of-two": BASE.with_(
        dim=33, n_heads=3, n_kv_heads=3, head_dim=10, hidden_dim=47, vocab_size=97, n_layers=3
    ),
    "heads-of-8": BASE.with_(dim=64, n_heads=8, n_kv_heads=4, head_dim=8, hidden_dim=172),
    "heads-of-128": BASE.with_(dim=40, n_heads=2, n_kv_heads=1, head_dim=128, n_layers=1),
    "scaled-rope": BASE.with_(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64), rope_theta=500.0),
    "yarn": BASE.with_(rope_scaling=YarnRopeScaling(8.0, 64), rope_theta=500.0, qk_norm=True),
    "wide": BASE.with_(
        dim=336, n_heads=6, n_kv_heads=6, head_dim=56, hidden_dim=700, vocab_size=900, n_layers=1
    ),
    "wide-rows": BASE.with_(hidden_dim=600),
}


def random_batch(config, sequences=2, length=70, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = (
        torch.randint(config.vocab_size, (sequences, length), generator=generator) for _ in range(2)
    )
    targets[0, : length // 4] = -1
    return tokens, targets


def gradients(trainer):
    return {name: p.grad.clone() for name, p in trainer.parameters().items()}


def step(config, weights, batch, scale=1.0, threads=1):
    trainer = CpuTrainer(config, weights, threads)
    loss = trainer.train_step(*batch, scale)
    return loss, gradients(trainer)


def exact(config, weights, batch):
    """Loss and gradients in float64."""
    model = Model.from_weights(config, {name: w.double() for name, w in weights.items()})
    model.requires_grad_(True)
    logits = torch.nn.functional.linear(model.hidden(batch[0]), model.head_weight())
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch[1].flatten(), ignore_index=-1
    )
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def error(ours, expected):
    """Relative to each parameter's norm, over all parameters."""
    return math.sqrt(
        sum(float((ours[name].double() - g).norm() / g.norm()) ** 2 for name, g in expected.items())
        / len(expected)
    )


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_of_every_parameter(name):
    config, ratios = SHAPES[name], []
    for seed in range(3):
        weights, batch = weights_of(config, seed), random_batch(config, seed=seed + 1)
        loss, ours = step(config, weights, batch)
        expected_loss, expected = exact(config, weights, batch)
        plain = ReferenceEngine(config, weights, "cpu", "float32", train=True)
        plain.train_step(*batch)
        assert float(loss) == pytest.approx(float(expected_loss), rel=2e-6)
        ratios.append(error(ours, expected) / error(gradients(plain), expected))
        for parameter, gradient in expected.items():
            difference = (ours[parameter].double() - gradient).norm() / gradient.norm()
            assert difference < 5e-5, parameter
    assert sum(ratios) / len(ratios) <= 1.5  # 0.8 to 1.2 for every shape; of one seed up to 1.5


def test_gradients_are_the_slopes_of_the_loss():
    config = SHAPES["qk-norm"]
    weights, batch = weights_of(config), random_batch(config)
    _, ours = step(config, weights, batch)
    generator = torch.Generator().manual_seed(3)
    for name, weight in weights.items():
        direction = torch.randn(weight.shape, generator=generator).double()
        small = 1e-5 / direction.abs().max()
        losses = [
            exact(config, {**weights, name: weight.double() + sign * small * direction}, batch)[0]
            for sign in (1, -1)
        ]
        slope = float((losses[0] - losses[1]) / (2 * small))
        assert float((ours[name].double() * direction).sum()) == pytest.approx(
            slope, rel=1e-3, abs=1e-4 * float(ours[name].norm())
        )


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 64, 65])
def test_both_sides_of_a_block(length):
    config = SHAPES["gqa-interleaved"]
    weights, batch = weights_of(config), random_batch(config, 3, length)
    loss, ours = step(config, weights, batch)
    expected_loss, expected = exact(config, weights, batch)
    assert float(loss) == pytest.approx(float(expected_loss), rel=2e-6)
    assert error(ours, {n: g for n, g in expected.items() if g.norm() > 1e-9}) < 1e-5


def test_bits_do_not_depend_on_threads_or_run(monkeypatch):
    monkeypatch.setattr(engine, "usable_cores", lambda: 16)
    config = SHAPES["qk-norm"]
    weights, batch = weights_of(config), random_batch(config, 3, 100)
    loss, expected = step(config, weights, batch)
    for threads in (1, 2, 3, 7):
        trainer = CpuTrainer(config, weights, threads)
        assert trainer.describe()["threads"] == threads
        again = trainer.train_step(*batch)
        ours = gradients(trainer)
        assert torch.equal(loss, again)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_sequences_loss_does_not_depend_on_the_others():
    config = SHAPES["plain"]
    weights, (tokens, targets) = weights_of(config), random_batch(config, 4, 50)
    trainer = CpuTrainer(config, weights, 1)
    alone = [trainer.loss_sum(tokens[i : i + 1], targets[i : i + 1]) for i in range(4)]
    assert trainer.loss_sum(tokens, targets) == pytest.approx(sum(alone), rel=1e-12)


def test_gradients_add_up_and_begin_anew():
    config = SHAPES["one-kv-head-untied"]
    weights = weights_of(config)
    first, second = random_batch(config, seed=1), random_batch(config, seed=2)
    _, one = step(config, weights, first, 0.25)
    _, two = step(config, weights, second, 0.75)
    trainer = CpuTrainer(config, weights, 1)
    trainer.train_step(*first, 0.25)
    trainer.train_step(*second, 0.75)
    both = gradients(trainer)
    for name in both:
        torch.testing.assert_close(both[name], one[name] + two[name], rtol=2e-6, atol=1e-7)
    for parameter in trainer.parameters().values():
        parameter.grad = None
    trainer.train_step(*first, 0.25)
    assert all(torch.equal(one[name], ours) for name, ours in gradients(trainer).items())


def test_gradients_that_somebody_else_has_set_are_added_to():
    config = SHAPES["plain"]
    weights, batch = weights_of(config), random_batch(config)
    _, alone = step(config, weights, batch)
    trainer = CpuTrainer(config, weights, 1)
    for parameter in trainer.parameters().values():
        parameter.grad = torch.ones_like(parameter)
    trainer.parameters()["norm.weight"].grad = None
    trainer.train_step(*batch)
    for name, ours in gradients(trainer).items():
        before = 0.0 if name == "norm.weight" else 1.0
        torch.testing.assert_close(ours, alone[name] + before, rtol=1e-6, atol=1e-6)


def test_nothing_is_read_that_was_not_written_before():
    config = SHAPES["qk-norm"]
    weights, batch = weights_of(config), random_batch(config, 2, 45)
    _, expected = step(config, weights, batch)
    trainer = CpuTrainer(config, weights, 2)
    trainer.train_step(*batch)
    (buffers,) = trainer._batches.values()
    memory = buffers._memory
    memory.tensor(0, (memory.size // 4,), torch.float32).fill_(math.nan)
    for parameter in trainer.parameters().values():
        parameter.grad.fill_(math.nan)
        parameter.grad = None
    trainer.train_step(*batch)
    assert all(torch.equal(expected[name], ours) for name, ours in gradients(trainer).items())


def test_logits_that_do_not_fit_at_once(monkeypatch):
    config = SHAPES["plain"]
    weights, batch = weights_of(config), random_batch(config, 4, 100)
    loss, whole = step(config, weights, batch)
    monkeypatch.setattr(batches, "LOGITS_BYTES", 1)
    monkeypatch.setattr(batches, "ITEM_TOKENS", 1)
    again, parts = step(config, weights, batch)
    assert torch.equal(loss, again)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)


def test_the_loss_alone_and_other_shapes_in_between():
    config = SHAPES["gqa-interleaved"]
    weights, batch = weights_of(config), random_batch(config)
    loss, expected = step(config, weights, batch)
    trainer = CpuTrainer(config, weights, 1)
    count = int((batch[1] >= 0).sum())
    assert trainer.loss_sum(*batch) == pytest.approx(float(loss) * count, rel=1e-6)
    assert all(p.grad is None for p in trainer.parameters().values())
    trainer.train_step(*batch)
    for length in (1, 33, 80):
        trainer.loss_sum(*random_batch(config, 1, length))
    assert len(trainer._batches) <= 2
    assert all(torch.equal(expected[name], ours) for name, ours in gradients(trainer).items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.1.mlp.down_proj.weight"])
def test_what_is_not_finite_makes_the_loss_so(name, value):
    config = SHAPES["plain"]
    weights = {each: tensor.clone() for each, tensor in weights_of(config).items()}
    weights[name].view(-1)[5] = value
    tokens, targets = random_batch(config)
    tokens[:, 0] = 0
    loss, _ = step(config, weights, (tokens, targets))
    assert not math.isfinite(float(loss))


def test_targets_that_do_not_count():
    config = SHAPES["plain"]
    weights, (tokens, targets) = weights_of(config), random_batch(config)
    trainer = CpuTrainer(config, weights, 1)
    assert math.isnan(float(trainer.train_step(tokens, torch.full_like(targets, -1))))
    assert trainer.loss_sum(tokens, torch.full_like(targets, -1)) == 0.0


def test_bad_input():
    config = SHAPES["plain"]
    trainer = CpuTrainer(config, weights_of(config), 1)
    tokens, targets = random_batch(config)
    with pytest.raises(BadInput, match="131"):
        trainer.train_step(tokens + 100, targets)
    with pytest.raises(BadInput, match="target"):
        trainer.train_step(tokens, targets + 100)
    with pytest.raises(BadInput, match="target"):
        trainer.train_step(tokens, targets[:, 1:])
    with pytest.raises(BadInput, match="no tokens"):
        trainer.train_step(tokens[:0], targets[:0])
    with pytest.raises(BadInput, match="256"):
        trainer.train_step(*random_batch(config, 1, 257))


def test_parts_of_the_time_add_up():
    config = SHAPES["wide"]
    trainer = CpuTrainer(config, weights_of(config), 2)
    parts = []
    batch = random_batch(config, 4, 128)
    trainer.train_step(*batch, mark=lambda part, seconds=None: parts.append((part, seconds)))
    assert [part for part, _ in parts] == ["stall", "forward", "loss", "backward"]
    assert all(seconds > 0 for _, seconds in parts[1:3])
    (buffers,) = trainer._batches.values()
    wall = sum(buffers.seconds())
    spent = trainer.telemetry()["thread_seconds"]
    assert spent.keys() == {kind.name.lower() for kind in Kind}
    # the caller's thread at least; another may begin late on a busy machine
    assert sum(spent.values()) >= 0.9 * wall
    assert sum(trainer.telemetry()["thread_seconds"].values()) == 0.0
