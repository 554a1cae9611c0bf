"""The reference engine: the shared suite, devices and dtypes, and gradients."""

import pytest
import torch

from onelaunch.engines.engine import Sampling
from onelaunch.engines.reference import ReferenceEngine, resolve_device, resolve_dtype
from onelaunch.errors import BadInput
from onelaunch.generation.decode import generate_ids
from onelaunch.model import Model
from tests.engines.suite import SMALL, EngineSuite, relative_error, weights_of


class TestReference(EngineSuite):
    def make(self, config, weights):
        return ReferenceEngine(config, weights, device="cpu")


def trainer(**options) -> ReferenceEngine:
    return ReferenceEngine(SMALL, weights_of(SMALL), device="cpu", train=True, **options)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(
        0, SMALL.vocab_size, (3, 9), generator=torch.Generator().manual_seed(seed)
    )
    targets = tokens.roll(-1, 1)
    targets[0, 3] = -1
    return tokens, targets


def test_weights_are_used_without_a_copy_unless_trained():
    weights = weights_of(SMALL)
    pointers = {w.data_ptr() for w in weights.values()}
    serving = ReferenceEngine(SMALL, weights, device="cpu").model
    assert {p.data_ptr() for p in serving.parameters()} == pointers
    assert not any(p.requires_grad for p in serving.parameters())
    training = trainer().parameters()
    assert not {p.data_ptr() for p in training.values()} & pointers
    assert list(training) == list(SMALL.weight_shapes())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in training.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_err_as_plain_pytorch_does(dtype):
    weights = weights_of(SMALL)
    tokens, _ = batch()
    exact = Model.from_weights(SMALL, {n: w.double() for n, w in weights.items()})(tokens)
    engine = ReferenceEngine(SMALL, weights, device="cpu", dtype=dtype)
    narrow = {n: w.to(getattr(torch, dtype)) for n, w in weights.items()}
    plain = Model.from_weights(SMALL, narrow)(tokens)
    error = relative_error(engine.logits(tokens), exact)
    assert 1e-5 < error <= 1.5 * relative_error(plain, exact)
    assert len(generate_ids(engine, [[1]], 8, Sampling())[0]) == 8
    assert engine.describe()["dtype"] == dtype


def test_gradients_equal_autograd_and_accumulate_with_their_scale():
    model = Model.from_weights(SMALL, {n: w.clone() for n, w in weights_of(SMALL).items()})
    model.requires_grad_(True)
    engine = trainer()
    losses = []
    for seed, scale in ((0, 0.25), (1, 0.75)):
        expected = model.loss(*batch(seed))
        (scale * expected).backward()
        loss = engine.train_step(*batch(seed), scale)
        assert loss.item() == expected.item()
        assert not loss.requires_grad
        losses.append(loss.item())
    assert losses[0] != losses[1]
    for name, parameter in model.named_parameters():
        assert torch.equal(engine.parameters()[name].grad, parameter.grad), name


def test_gradients_point_downhill():
    engine = trainer()
    before = engine.train_step(*batch())
    with torch.no_grad():
        for parameter in engine.parameters().values():
            parameter -= 0.01 * parameter.grad
    assert engine.train_step(*batch()) < before - 0.01


def test_the_parts_are_marked_in_order():
    parts: list[str] = []
    trainer().train_step(*batch(), mark=parts.append)
    assert parts == ["forward", "backward"]


def test_dropout_acts_in_training_only_and_follows_the_global_seed():
    engine, plain = trainer(dropout=0.5), trainer()
    tokens, targets = batch()
    assert torch.equal(engine.logits(tokens), plain.logits(tokens))
    torch.manual_seed(7)
    first = engine.train_step(tokens, targets)
    second = engine.train_step(tokens, targets)
    torch.manual_seed(7)
    assert engine.train_step(tokens, targets) == first != second
    assert plain.train_step(tokens, targets) != first
    assert torch.equal(engine.logits(tokens), plain.logits(tokens))


def test_an_engine_trains_after_it_has_generated():
    engine = trainer()
    text = generate_ids(engine, [[1, 2]], 6, Sampling())
    assert text == generate_ids(
        ReferenceEngine(SMALL, weights_of(SMALL), device="cpu"), [[1, 2]], 6, Sampling()
    )
    engine.train_step(*batch())
    assert all(p.grad is not None for p in engine.parameters().values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_sequences_together_follow_the_definition(dtype):
    """Every greedy token of a batch is the best of the logits of its whole sequence, or nearly."""
    engine = ReferenceEngine(SMALL, weights_of(SMALL), device="cpu", dtype=dtype)
    prompts = [[5, 17, 3], [9], [1, 2, 3, 4, 5, 6, 7]]
    for prompt, new in zip(prompts, generate_ids(engine, prompts, 9), strict=True):
        assert len(new) == 9
        logits_SV = engine.logits([[*prompt, *new[:-1]]])[0, len(prompt) - 1 :]
        behind_S = logits_SV.amax(-1) - logits_SV.gather(-1, torch.tensor(new)[:, None])[:, 0]
        assert (behind_S <= 0.05 * logits_SV.std(-1)).all()


def test_autocast_keeps_float32_parameters_and_gradients():
    engine, plain = trainer(dtype="bfloat16"), trainer()
    loss = engine.train_step(*batch())
    expected = plain.train_step(*batch())
    assert loss.dtype == torch.float32
    assert loss != expected
    assert abs(loss - expected) < 0.02 * expected
    for name, parameter in engine.parameters().items():
        assert parameter.grad.dtype == parameter.dtype == torch.float32
        assert relative_error(parameter.grad, plain.parameters()[name].grad) < 0.1
    assert len(generate_ids(engine, [[1]], 4, Sampling())[0]) == 4


def test_only_a_training_engine_gives_gradients():
    engine = ReferenceEngine(SMALL, weights_of(SMALL), device="cpu")
    with pytest.raises(RuntimeError, match="train=True"):
        engine.train_step(*batch())
    with pytest.raises(RuntimeError, match="train=True"):
        engine.parameters()


def test_float16_does_not_train():
    with pytest.raises(BadInput, match="float16"):
        trainer(dtype="float16")


def test_threads():
    before = torch.get_num_threads()
    try:
        engine = ReferenceEngine(SMALL, weights_of(SMALL), device="cpu", threads=1)
        assert torch.get_num_threads() == engine.describe()["threads"] == 1
    finally:
        torch.set_num_threads(before)
    with pytest.raises(BadInput, match="threads=0"):
        ReferenceEngine(SMALL, weights_of(SMALL), device="cpu", threads=0)


def test_device_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("mps", "cuda", "cuda:0", "gpu", "cuda:x", "meta", "", "cuda:-1"):
        with pytest.raises(BadInput, match="device") as error:
            resolve_device(name)
        assert "\n" not in str(error.value)


def test_cuda_devices_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(BadInput, match="cuda:2': the GPUs here are numbered 0 to 1"):
        resolve_device("cuda:2")


def test_dtype_names():
    assert resolve_dtype(None, torch.device("cpu")) == torch.float32
    assert resolve_dtype(None, torch.device("mps")) == torch.float32
    assert resolve_dtype(None, torch.device("cuda", 0)) == torch.bfloat16
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16
    with pytest.raises(BadInput, match="fp32"):
        resolve_dtype("fp32", torch.device("cpu"))
