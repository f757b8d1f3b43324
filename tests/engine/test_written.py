"""What programs get that write with an engine as `thl run` does: texts or answers, kept, timed and read to the end."""

import pytest
import torch

from thl_engine import Engine, TokenizerError
from thl_engine.engine.answering import write
from thl_engine.engine.written import Written
from thl_engine.report.statistics import backend, describe


@pytest.fixture
def engine(packed):
    with Engine.from_pretrained(packed) as engine:
        yield engine


def test_pieces_pass_and_are_kept(engine):
    sampling = {"temperature": 0.8, "top_k": 20, "seed": 3}
    expected = list(engine.generate("To be,", max_new_tokens=12, **sampling))
    written = Written(engine, write(engine, ["To be,"], max_new_tokens=12, sampling=sampling))
    assert [piece for _, piece in written] == expected == written.pieces[0]
    timing = written.timing()
    assert timing["prompt_tokens"] == len(engine.tokenizer.encode("To be,")) and timing["new_tokens"] == 12
    assert timing["decode_tokens_per_second"] == pytest.approx(11 / timing["decode_seconds"])
    table = describe({**engine.stats(), **timing}, [("effort", "some")])
    assert "12 tokens, " in table and "effort" in table and "prompt" not in describe(engine.stats())
    assert f"backend {engine.ops.name}" in backend(engine) and "on cpu" in backend(engine)


def test_several_prompts_are_written_side_by_side(packed):
    with Engine.from_pretrained(packed, batch_size=2) as engine:
        written = Written(engine, write(engine, ["To", "be, or"], max_new_tokens=5, sampling={"seed": 1}), 2)
        for _ in written:
            pass
        alone = [list(engine.generate(prompt, max_new_tokens=5, seed=1)) for prompt in ("To", "be, or")]
    assert [[piece.id for piece in of] for of in written.pieces] == [[piece.id for piece in of] for of in alone]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_the_rest_is_read_once(engine, count):
    """Afterwards the state has read what was written, however the text ended."""
    state, other = engine.new_state(), engine.new_state()
    written = Written(engine, write(engine, ["To be,"], max_new_tokens=count, sampling={"seed": 2}, state=state))
    list(written)
    for _ in range(2):
        written.read_rest(state)
    ids = engine.tokenizer.encode("To be,") + [piece.id for piece in written.pieces[0]]
    engine.prefill(torch.tensor([ids]), other)
    assert state.timestep == other.timestep == len(ids)


def test_nothing_was_written(engine):
    written = Written(engine, iter(()))
    assert list(written) == []
    assert written.timing()["new_tokens"] == 0 and written.timing()["decode_tokens_per_second"] is None


def test_a_prompt_for_a_model_without_a_template(engine):
    with pytest.raises(TokenizerError, match="template"):
        write(engine, ["To be,"], max_new_tokens=1, chat=True)
