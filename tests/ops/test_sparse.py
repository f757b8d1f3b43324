"""Sparse feed-forward layers: products that skip zeros, and matrices stored by columns for them."""

import json

import pytest
import torch
from conftest import FIXTURES, load_case, read_float
from safetensors.torch import load_file, save_file

from thl_engine import CheckpointError, Engine
from thl_engine.checkpoint import pack
from thl_engine.checkpoint.pack import write_store
from thl_engine.checkpoint.quant import quantize_rows
from thl_engine.checkpoint.spool import tensor_sources
from thl_engine.checkpoint.store import open_store
from thl_engine.config import parse_config
from thl_engine.kernels.int8 import dequantize
from thl_engine.models import gemma3n
from thl_engine.ops import native
from thl_engine.ops.native_ops import NativeOps
from thl_engine.ops.reference import ReferenceOps
from thl_engine.ops.weights import Held

CASE = load_case(FIXTURES / "gemma3n" / "forward48")
SPARSE = [i for i, share in enumerate(CASE.config["activation_sparsity_pattern"]) if share > 0]
DOWN = f"model.layers.{SPARSE[0]}.mlp.down_proj.weight"
DENSE = "model.layers.5.mlp.down_proj.weight"
compiled = pytest.mark.skipif(not native.available(), reason=str(native.reason()))


@pytest.fixture(autouse=True)
def settings():
    torch.manual_seed(0)
    if not native.available():
        yield
        return
    isa, threads = native.isa(), native.threads()
    yield
    native.set_isa(isa)
    native.set_threads(threads)


def everywhere(run):
    """The result of run(), which every instruction set and number of threads gives bit for bit."""
    found = []
    for isa in native.available_isas():
        for threads in (1, 3):
            native.set_isa(isa)
            native.set_threads(threads)
            found.append(run())
            assert torch.equal(found[0], found[-1]), (isa, threads)
    return found[0]


def sparse(batch: int, width: int, share: float) -> torch.Tensor:
    x = torch.randn(batch, width)
    return torch.where(torch.rand(batch, width) < share, x, torch.zeros(()))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape and not found.isnan().any()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@compiled
@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_products_that_skip_zeros(share, group):
    """Against dense products; rows for which every x is zero are not read, and the batch changes no bits."""
    for rows, columns in ((1, 1), (7, 33), (129, 255), (2100, 301)):
        weight = torch.randn(rows, columns)
        q, scales = quantize_rows(weight, group)
        for batch in (1, 2, 3, 4, 5, 6, 7, 8, 19):
            x, out = sparse(batch, rows, share), torch.empty(batch, columns)
            unread = scales.clone()
            unread[(x == 0).all(dim=0)] = float("nan")

            def product(x=x, q=q, unread=unread, batch=batch, columns=columns):
                out = torch.full((batch, columns), float("nan"))
                native.linear_int8_transposed(x, q, unread, out, False)
                return out

            found = everywhere(product) if batch in (1, 5) else product()
            close(found, (x.double() @ dequantize(q, scales, group).double()).float())
            cut = rows // 3
            native.linear_int8_transposed(x[:, :cut], q[:cut], scales[:cut], out, False)
            native.linear_int8_transposed(x[:, cut:], q[cut:], scales[cut:], out, True)
            assert torch.equal(out, found)
            native.linear_int8_transposed(x[-1:], q, scales, out[:1], False)
            assert torch.equal(out[0], found[-1])


@compiled
@pytest.mark.parametrize("kind", ["int8", "grouped", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_results_that_are_multiplied_by_zero(share, kind):
    """The bits of all products, without reading the rows that no result needs."""
    ops, group = NativeOps(), 128 if kind == "grouped" else None
    for rows, columns in ((1, 1), (33, 7), (255, 129), (2100, 200), (20, 5000)):
        weight = torch.randn(rows, columns)
        floats = kind in ("float32", "bfloat16", "float16")
        held = Held(weight.to(getattr(torch, kind))) if floats else Held(*quantize_rows(weight, group), group)
        for batch in (1, 2, 5, 8):
            factors, x = sparse(batch, rows, share), torch.randn(batch, columns)
            alive = factors.any(dim=0)
            data = held.data.clone().masked_fill_(~alive[:, None], float("nan")) if floats else held.data
            scales = None if floats else held.scales.clone()
            if not floats:
                scales[~alive] = float("nan")

            def product(x=x, data=data, scales=scales, factors=factors, floats=floats):
                out = factors.clone()
                if floats:
                    native.multiply_float(x, data, out)
                else:
                    native.multiply_int8(native.pack_activations(x), data, scales, out)
                return out

            found = everywhere(product) if batch in (1, 5) else product()
            assert torch.equal(found, torch.where(factors != 0, factors * ops.linear(x, held), factors))


@compiled
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, q, s, out: native.multiply_float(x, q, out), "w: expected float32, bfloat16 or float16, found int8"),
        (lambda x, q, s, out: native.multiply_float(x[:, 1:], q.float(), out), r"w: expected shape \[any, 8\]"),
        (
            lambda x, q, s, out: native.multiply_int8(native.pack_activations(x), q, s[1:], out),
            "scales: expected shape",
        ),
        (
            lambda x, q, s, out: native.multiply_int8(native.pack_activations(x), q, s, out, 1),
            "out: expected at least 4",
        ),
        (lambda x, q, s, out: native.multiply_int8(native.pack_activations(x), q.float(), s, out), "w: expected int8"),
    ],
)
def test_arguments_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 9), torch.ones(3, 9, dtype=torch.int8), torch.ones(3), torch.ones(2, 3))


def test_the_linear_map_of_a_transposed_matrix():
    weight = torch.randn(37, 61)
    plain, turned = Held(weight), Held(weight.T.contiguous(), transposed=True)
    quantized = Held(*quantize_rows(weight.T.contiguous()), transposed=True)
    for shape in ((1, 61), (2, 3, 61), (0, 61)):
        x = sparse(shape[0] * (shape[1] if len(shape) == 3 else 1), 61, 0.1).view(shape)
        expected = x @ weight.T
        for ops in [ReferenceOps(), *([NativeOps()] if native.available() else [])]:
            for matrix, tolerance in ((plain, 1e-4), (turned, 1e-4), (quantized, 0.05)):
                found = ops.linear_sparse(x, matrix)
                assert found.shape == expected.shape
                assert not found.numel() or (found - expected).abs().max() <= tolerance * expected.abs().max()


# --- files ---------------------------------------------------------------------------------------------------------


def packed(path, quantize: str = "int8", **options):
    write_store(
        path,
        parse_config(CASE.config, "gemma3n"),
        tensor_sources(CASE.weights, "weights"),
        quantize=quantize,
        **options,
    )
    return path


def unturned(path, monkeypatch):
    """A file as written before matrices were stored by columns."""
    with monkeypatch.context() as patch:
        patch.setattr(pack, "may_transpose", lambda block: False)
        return packed(path)


def remarked(path, name: str, **entry):
    """The file with other metadata of one tensor, the checksum made to fit; None takes a field away."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header["__metadata__"]
    pages = json.loads(metadata["thl_engine.pages"])
    changed = {**pages.get(name, {}), **entry}
    pages[name] = {key: value for key, value in changed.items() if value is not None}
    metadata["thl_engine.pages"] = json.dumps(pages)
    metadata["thl_engine.checksum"] = f"{pack.metadata_checksum(metadata):08x}"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return path


def logits(path, backend: str = "auto", **options) -> torch.Tensor:
    with Engine.from_pretrained(path, device="cpu", backend=backend, **options) as engine:
        found, state = engine.forward(CASE.io["input_ids"])
        return torch.cat([found, engine.step(CASE.io["input_ids"][:, 0], state)[0][:, None]], dim=1)


@pytest.mark.parametrize("group", [None, 128])
def test_what_is_stored_by_columns(tmp_path, monkeypatch, group):
    """Down projections behind a sparse gate and nothing else, whatever the chunks that the file is written in."""
    whole = packed(tmp_path / "whole.safetensors", group=group).read_bytes()
    monkeypatch.setattr(pack, "CHUNK_ELEMENTS", 1)
    assert packed(tmp_path / "pieces.safetensors", group=group).read_bytes() == whole
    monkeypatch.setattr(pack, "PAGE_BYTES", 256)
    store = open_store(packed(tmp_path / "pages.safetensors", group=group))
    config = parse_config(CASE.config, "gemma3n")
    turned = [name for name, tensor in store.tensors.items() if tensor.transposed]
    assert turned == [f"model.layers.{i}.mlp.down_proj.weight" for i in SPARSE]
    assert turned == [block.name for block in gemma3n.blocks(config) if block.transposed]
    for name in turned:
        q, scales = quantize_rows(CASE.weights[name].T.contiguous(), group)
        assert torch.equal(store.read(name), q) and torch.equal(store.read(f"{name}.scale"), scales)
        assert len(store.tensors[name].pages) > 1
    assert not any(t.transposed for t in open_store(packed(tmp_path / "floats.safetensors", "none")).tensors.values())


def test_all_layouts_give_the_same(tmp_path, monkeypatch, backend):
    """By columns, by rows as before, and by columns from a tool that drops the metadata; resident and streamed."""
    new, old = packed(tmp_path / "new.safetensors"), unturned(tmp_path / "old.safetensors", monkeypatch)
    expected = logits(new, backend)
    for path in (new, old):
        store = open_store(path)
        floats = {
            name: read_float(store, name).T if store.tensors[name].transposed else read_float(store, name)
            for name in CASE.weights
        }
        with Engine.from_state_dict("gemma3n", CASE.config, floats, device="cpu", backend="reference") as engine:
            close(logits(path, backend)[:, :-1], engine.forward(CASE.io["input_ids"])[0], 1e-3)
    assert torch.equal(logits(new, backend, stream=True), expected)
    resaved = tmp_path / "resaved"
    resaved.mkdir()
    save_file(
        {k: v for k, v in load_file(new).items() if not k.startswith(pack.PADDING)}, resaved / "model.safetensors"
    )
    (resaved / "config.json").write_text(json.dumps({**CASE.config, "model_type": "gemma3n"}))
    assert open_store(resaved).tensors[DOWN].transposed
    assert torch.equal(logits(resaved, backend), expected)
    with Engine.from_state_dict(
        "gemma3n", CASE.config, CASE.weights, device="cpu", backend=backend, quantize="int8"
    ) as engine:
        assert torch.equal(engine.forward(CASE.io["input_ids"])[0], expected[:, :-1])


def test_marks_that_cannot_be(tmp_path, monkeypatch):
    path, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    for name, mark in (
        (DOWN, "yes"),
        (DOWN, 1),
        (DOWN, False),
        (DENSE, True),
        ("model.norm.weight", True),
        (f"{DOWN}.scale", True),
        ("nothing", True),
        ("model.embed_tokens.weight", True),
    ):
        with pytest.raises(CheckpointError, match=f"marks '{name}' as transposed"):
            open_store(remarked(packed(path), name, transposed=mark))
    with pytest.raises(CheckpointError, match=f"'{DOWN}' has shape .*, the config needs"):
        open_store(remarked(packed(path), DOWN, transposed=None))
    with pytest.raises(CheckpointError, match=f"'{DOWN}' has shape .*, the config needs"):
        open_store(remarked(unturned(old, monkeypatch), DOWN, transposed=True))
    with pytest.raises(CheckpointError, match=f"'{DOWN}.scale' is F32 .* expected F32 scales of int8"):
        open_store(remarked(packed(path), DOWN, group=128))


def test_square_matrices_stay_as_they_are(tmp_path):
    """Their shape would not tell that they are transposed."""
    config = parse_config({**CASE.config, "intermediate_size": [CASE.config["hidden_size"]] * 6}, "gemma3n")
    blocks = gemma3n.blocks(config)
    weights = {b.name: torch.randn(b.shape) for b in blocks}
    path = tmp_path / "square.safetensors"
    write_store(path, config, tensor_sources(weights, "weights"), quantize="int8")
    assert any(b.transposed for b in blocks) and not any(t.transposed for t in open_store(path).tensors.values())


def test_non_finite_columns_are_named(tmp_path):
    bad = CASE.weights[DOWN].clone()
    bad[2, 5] = float("nan")
    with pytest.raises(CheckpointError, match=f"'{DOWN}' cannot be quantised: NaN or infinity in column 5"):
        write_store(
            tmp_path / "x.safetensors",
            parse_config(CASE.config, "gemma3n"),
            tensor_sources({**CASE.weights, DOWN: bad}, "weights"),
            quantize="int8",
        )


@compiled
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_plan_counts_what_is_touched(tmp_path, monkeypatch, batch_size):
    """Pages are read whole from disk, but products need a share of sparse ones; without columns, only of `up`."""
    new, old = packed(tmp_path / "new.safetensors"), unturned(tmp_path / "old.safetensors", monkeypatch)
    plans = {}
    for path in (new, old):
        for backend in ("native", "reference"):
            with Engine.from_pretrained(
                path, device="cpu", backend=backend, stream=True, batch_size=batch_size
            ) as engine:
                plans[path, backend] = engine.plan()
    everything = plans[old, "reference"].bytes_per_token
    assert plans[new, "reference"].bytes_per_token == everything
    pattern, down = CASE.config["activation_sparsity_pattern"], CASE.weights[DOWN].numel()
    left_out = sum(down * pattern[i] ** batch_size for i in SPARSE if pattern[i] >= 1 - NativeOps.sparse_share)
    assert left_out > 0
    assert plans[old, "native"].bytes_per_token == pytest.approx(everything - left_out)
    assert plans[new, "native"].bytes_per_token == pytest.approx(everything - 2 * left_out)
    assert len({plan.bytes_streamed_per_token for plan in plans.values()}) == 1
