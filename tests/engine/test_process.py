"""An engine in a process: threads that share it, what is left when it goes, files that change meanwhile."""

import gc
import os
import threading
import time

import pytest
import torch
from conftest import MODELS, SMALL, configured, random_weights

from thl_engine import BudgetError, CheckpointError, ConfigError, Engine, EngineError
from thl_engine.checkpoint.store import open_store
from thl_engine.models.kv_cache import KVCache


def tokens_of(engine: Engine, start: int) -> torch.Tensor:
    """Logits of a prompt and a few steps."""
    state, out = engine.new_state(), []
    logits, state = engine.prefill(torch.tensor([[start, 2, 1]]), state)
    for t in range(4):
        out.append(logits.clone())
        logits, state = engine.step(torch.tensor([(start + t) % engine.config.vocab_size]), state)
    return torch.cat([*out, logits])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_threads_wait_for_each_other(model, stream):
    config, weights = configured(model)
    engine = Engine.from_state_dict(model, config, weights, device="cpu", quantize="int8", stream=stream)
    wanted = [tokens_of(engine, start) for start in range(3)]
    found: list[object] = []

    def work(start: int) -> None:
        try:
            found.extend(torch.equal(tokens_of(engine, start), wanted[start]) for _ in range(4))
        except BaseException as error:  # a thread's errors are lost otherwise
            found.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 12


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_engine_says_so(small, stream):
    config, weights = small
    engine = Engine.from_state_dict("thl", config, weights, device="cpu", stream=stream)
    state, token = engine.new_state(), torch.tensor([1])
    pieces = engine.generate([1, 2], max_new_tokens=3)
    engine.close()
    engine.close()
    for use in (
        lambda: engine.step(token, state),
        lambda: engine.prefill(token[None], state),
        lambda: engine.forward(token[None]),
        lambda: engine.new_state(),
        lambda: engine.generate([1], max_new_tokens=1),
        lambda: engine.generate_batch([[1]], max_new_tokens=1),
        lambda: next(pieces),
        lambda: engine.save_state(state, "nowhere"),
    ):
        with pytest.raises(EngineError, match="was closed"):
            use()


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "options", [{"memory_budget": 1000}, {"context": 5}, {"backend": "fortran"}, {"stream": True}, {"stream": False}]
)
def test_what_is_refused_or_dropped_leaves_nothing_open(plain, options):
    before = descriptors()
    for _ in range(3):
        try:
            Engine.from_pretrained(plain, device="cpu", quantize="int8", **options)
        except EngineError:
            pass
    assert descriptors() == before


def flip(path, page) -> None:
    time.sleep(0.01)  # a time of change is as fine as the kernel's clock, a few milliseconds
    with open(path, "r+b") as file:
        file.seek(page.offset)
        byte = file.read(1)
        file.seek(page.offset)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("how", ["written to", "replaced", "gone"])
def test_a_file_that_changes_in_use_is_refused(packed, tmp_path, how):
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed.read_bytes())
    page = open_store(path).tensors["router.W_q.weight"].pages[0]
    engine = Engine.from_pretrained(path, device="cpu", stream=True)
    tokens_of(engine, 0)
    if how == "written to":
        flip(path, page)
    elif how == "replaced":
        other = tmp_path / "other"
        other.write_bytes(packed.read_bytes())
        os.replace(other, path)
    else:
        path.unlink()
    for _ in range(2):  # and stays refused
        with pytest.raises(CheckpointError, match="changed while it was in use|cannot be reached any more"):
            tokens_of(engine, 0)


def test_checksums_can_be_compared_at_every_read(packed, tmp_path):
    """What changes a file behind the system's back shows in them alone."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed.read_bytes())
    page, found = open_store(path).tensors["router.W_q.weight"].pages[0], {}
    for verify in ("first", "always"):
        engine = Engine.from_pretrained(path, device="cpu", stream=True, verify=verify)
        tokens_of(engine, 0)
        engine._store.check_unchanged = lambda: None
        flip(path, page)
        try:
            tokens_of(engine, 0)
            found[verify] = "computed"
        except CheckpointError as error:
            found[verify] = "CRC32C" if "checksum" in str(error).lower() else str(error)
        flip(path, page)
        engine.close()
    assert found == {"first": "computed", "always": "CRC32C"}
    with pytest.raises(ConfigError, match="verify is 'never'"):
        Engine.from_pretrained(path, verify="never")


def test_states_are_of_their_own_model(small, tmp_path):
    config, weights = small
    engine = Engine.from_state_dict("thl", config, weights, device="cpu")
    other = Engine.from_state_dict("thl", {**config, "novelty_theta": 0.5}, weights, device="cpu")
    state, token = other.new_state(), torch.tensor([1])
    for wrong, what in ((None, "NoneType"), ("x", "str"), (state, "another configuration"), (state.clone(), "another")):
        with pytest.raises(ConfigError, match=f"state: .*{what}"):
            engine.step(token, wrong)
    other.save_state(state, tmp_path / "s.safetensors")
    with pytest.raises(CheckpointError, match="novelty_theta 0.5; this one has 0.25"):
        engine.load_state(tmp_path / "s.safetensors")


@pytest.mark.parametrize("stream", ["auto", True, False])
def test_states_that_the_machine_cannot_hold_are_refused(small, stream):
    """When the engine is opened, with the numbers, rather than by torch when memory runs out."""
    config, weights = small
    with pytest.raises(BudgetError, match="a state of batch_size 1 takes .* GiB at its full context"):
        Engine.from_state_dict("thl", {**config, "memory_slots": 10**9}, weights, device="cpu", stream=stream)
    engine = Engine.from_state_dict("thl", config, weights, device="cpu", stream=stream)
    with pytest.raises(BudgetError, match="a state of batch_size 1000000000 takes "):
        engine.new_state(10**9)
    engine.new_state(2)


def test_prompts_are_texts_or_ids(small):
    engine = Engine.from_state_dict("thl", *small, device="cpu")
    wanted = [piece.id for piece in engine.generate([1, 2], max_new_tokens=2, temperature=0)]
    same = engine.generate(torch.tensor([1, 2]), max_new_tokens=2, temperature=0)
    assert [piece.id for piece in same] == wanted
    for wrong in (torch.tensor([[1, 2]]), [1.5], [[1]], 7, None, {"a": 1}):
        with pytest.raises(ConfigError, match="the prompt is "):
            engine.generate(wrong)


def test_logits_that_are_no_numbers_are_an_error():
    weights = random_weights(SMALL)
    weights["output_head.bias"][3] = float("nan")
    engine = Engine.from_state_dict("thl", SMALL.to_dict(), weights, device="cpu")
    with pytest.raises(EngineError, match="logits are not finite"):
        engine.step(torch.tensor([1]), engine.new_state())


def test_no_layer_keeps_the_floats_of_its_int8_rows(monkeypatch):
    """A pass over all layers holds the copies of one layer, not of all."""
    config, weights = configured("inl")
    engine = Engine.from_state_dict("inl", config, weights, device="cpu", kv_cache="int8")
    made, append = [], KVCache.append
    monkeypatch.setattr(KVCache, "append", lambda *given: made.append(append(*given)) or made[-1])
    attention = engine.ops.cached_attention(engine.new_state().cache, 0, 1, engine.device)
    row = torch.zeros(1, 1, engine.config.num_heads, engine.config.head_dim)
    for layer in range(engine.config.num_layers):
        attention.append(layer, row, row)
        attention(layer, row, 1.0, last=True)
        assert not attention._seen
