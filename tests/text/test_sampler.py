import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thl_engine.errors import ConfigError, EngineError
from thl_engine.text import sampler as sampler_module
from thl_engine.text.sampler import Sampler, Sampling, StopStrings


def plain_distribution(logits, sampling, history=()):
    """Probabilities by the definition, one Python number at a time: the slow twin of `Sampler`."""
    x = [float(v) for v in logits]
    if sampling.repetition_window:
        for token in set(history[-sampling.repetition_window :]):
            p = sampling.repetition_penalty
            x[token] = x[token] / p if x[token] > 0 else x[token] * p
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if sampling.temperature == 0:
        return [float(i == order[0]) for i in range(len(x))]
    if sampling.top_k:
        smallest = x[order[min(sampling.top_k, len(x)) - 1]]
        order = [i for i in order if x[i] >= smallest]
    weights = {i: math.exp((x[i] - x[order[0]]) / sampling.temperature) for i in order}
    if sampling.top_p is not None and sampling.top_p < 1:
        kept, total, limit = [], 0.0, sampling.top_p * math.fsum(weights.values())
        for i in order:
            if kept and total > limit:
                break
            kept.append(i)
            total += weights[i]
        order = kept
    total = math.fsum(weights[i] for i in order)
    return [weights[i] / total if i in order else 0.0 for i in range(len(x))]


SETTINGS = [
    Sampling(seed=1),
    Sampling(temperature=0.0),
    Sampling(temperature=0.5, seed=2),
    Sampling(temperature=2.0, top_k=3, seed=3),
    Sampling(top_k=0, top_p=1.0, seed=4),
    Sampling(top_p=0.6, seed=5),
    Sampling(top_p=1e-9, seed=6),
    Sampling(temperature=0.8, top_k=5, top_p=0.7, seed=7),
    Sampling(temperature=1.3, top_k=50, top_p=0.9, repetition_penalty=1.4, seed=8),
    Sampling(repetition_penalty=0.7, repetition_window=2, seed=9),
    Sampling(temperature=0.0, repetition_penalty=3.0, seed=10),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=repr)
def test_frequencies_match_the_definition(sampling):
    torch.manual_seed(0)
    logits = torch.randn(12) * 2
    logits[3] = logits[7]  # a tie
    history = [1, 5, 5, 3, 11]
    expected = plain_distribution(logits.tolist(), sampling, history)
    sampler, draws = Sampler(sampling), 3000
    counts = [0] * 12
    for _ in range(draws):
        counts[int(sampler.sample(logits, history)[0])] += 1
    for count, p in zip(counts, expected, strict=True):
        assert p > 0 or count == 0
        assert abs(count - draws * p) <= 4.5 * math.sqrt(draws * p * (1 - p)) + 1e-6


@given(
    values=st.lists(st.integers(-6, 6), min_size=1, max_size=20),
    k=st.one_of(st.none(), st.integers(0, 22)),
    p=st.one_of(st.none(), st.floats(0.01, 1.0)),
    temperature=st.sampled_from([0.0, 1e-300, 0.3, 1.0, 4.0]),
    penalty=st.sampled_from([1.0, 1.2, 0.5, 100.0]),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_only_tokens_the_definition_keeps_are_drawn(values, k, p, temperature, penalty, seed, data):
    sampling = Sampling(temperature, k, p, penalty, seed=seed)
    history = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=5))
    logits = torch.tensor([v / 2 for v in values])
    expected = plain_distribution(logits, sampling, history)
    sampler = Sampler(sampling)
    before = logits.clone()
    for _ in range(3):
        token, logprob = sampler.sample(logits, history)
        assert expected[int(token)] > 0
        assert float(logprob) == pytest.approx(float(torch.log_softmax(logits, 0)[token]), abs=1e-5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("scale", [0.01, 3.0])  # nearly flat: the head does not hold p; peaked: it does
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_p=0.9),
        Sampling(top_p=0.5, temperature=0.7),
        Sampling(top_k=2000, top_p=0.8),
        Sampling(top_k=7000, top_p=0.99),
    ],
    ids=repr,
)
def test_top_p_of_a_large_vocabulary_does_not_depend_on_the_short_cut(monkeypatch, scale, sampling):
    logits = (torch.randn(9000, generator=torch.Generator().manual_seed(3)) * scale * 4).round() / 4
    ids = {}
    for head in (sampler_module._HEAD, 10**9):
        monkeypatch.setattr(sampler_module, "_HEAD", head)
        drawing = Sampler(Sampling(**{**vars(sampling), "seed": 11}))
        ids[head] = [int(drawing.sample(logits)[0]) for _ in range(40)]
    assert len(set(map(tuple, ids.values()))) == 1
    expected = plain_distribution(logits.tolist(), sampling)
    assert all(expected[i] > 0 for i in ids[10**9])


def test_greedy_takes_the_lowest_index_among_equals():
    logits = torch.zeros(100_000)
    logits[[777, 40_000, 99_999]] = 5.0
    assert int(Sampler(Sampling(temperature=0)).sample(logits)[0]) == 777
    assert int(Sampler(Sampling(temperature=0)).sample(torch.zeros(100_000))[0]) == 0


def test_the_seed_decides_and_no_seed_is_random():
    logits = torch.randn(1000)

    def ids(seed):
        drawing = Sampler(Sampling(seed=seed))
        return [int(drawing.sample(logits)[0]) for _ in range(20)]

    assert ids(5) == ids(5) != ids(6)
    assert ids(None) != ids(None)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    ids(None)
    assert torch.equal(state, torch.get_rng_state()), "the global generator is not touched"


def test_rows_of_a_batch_are_independent_and_row_0_is_the_single_sequence():
    logits = torch.randn(3, 50)
    histories = [[1, 2], [], [7]]
    sampling = Sampling(temperature=0.9, top_k=20, repetition_penalty=1.3, seed=4)
    batch, single = Sampler(sampling, batch=3), Sampler(sampling)
    changed = logits.clone()
    changed[1:] = torch.randn(2, 50)
    other = Sampler(sampling, batch=3)
    for _ in range(10):
        ids, logprobs = batch.sample(logits, histories)
        assert ids.shape == logprobs.shape == (3,)
        assert ids.dtype == torch.int64 and logprobs.dtype == torch.float32
        token, logprob = single.sample(logits[0], histories[0])
        assert token.shape == logprob.shape == ()
        assert ids[0] == token == other.sample(changed, histories)[0][0]
        torch.testing.assert_close(logprobs[0], logprob)
        torch.testing.assert_close(logprobs, torch.log_softmax(logits, 1)[torch.arange(3), ids])


def test_history_may_be_a_tensor_or_left_out():
    logits = torch.tensor([[1.0, 1.0, 0.5]] * 2, dtype=torch.bfloat16)
    sampling = Sampling(temperature=0, repetition_penalty=4.0)
    assert Sampler(sampling, 2).sample(logits, torch.tensor([[0], [1]]))[0].tolist() == [1, 0]
    assert Sampler(sampling, 2).sample(logits)[0].tolist() == [0, 0]
    last_only = Sampling(0, repetition_penalty=4.0, repetition_window=1)
    assert int(Sampler(last_only).sample(logits[0], [0, 2])[0]) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("sampling", SETTINGS[:6], ids=repr)
def test_logits_that_are_no_numbers_are_an_error(bad, sampling):
    logits = torch.zeros(2, 30)
    logits[1, 17] = bad
    with pytest.raises(EngineError, match=r"row 1 at token 17 \((nan|-?inf)\)"):
        Sampler(sampling, 2).sample(logits)


def test_extreme_finite_logits_work():
    top = torch.finfo(torch.float32).max
    logits = torch.tensor([-top, top, 0.0, top])
    for sampling in (Sampling(1e-300, seed=0), Sampling(1e300, 2, 0.5, 1e300, seed=0), Sampling(1.0, seed=1)):
        assert int(Sampler(sampling).sample(logits, [1, 0])[0]) in (0, 1, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Sampler(Sampling()).sample(torch.zeros(2, 5)),
        lambda: Sampler(Sampling()).sample(torch.zeros(1, 1, 5)),
        lambda: Sampler(Sampling()).sample(torch.zeros(0)),
        lambda: Sampler(Sampling()).sample(torch.zeros(5, dtype=torch.int64)),
        lambda: Sampler(Sampling(), 2).sample(torch.zeros(2, 5), [[1]]),
        lambda: Sampler(Sampling(repetition_penalty=2.0)).sample(torch.zeros(5), [1, 5]),
        lambda: Sampler(Sampling(repetition_penalty=2.0)).sample(torch.zeros(5), [-1]),
    ],
)
def test_shapes_and_ids_that_do_not_fit(call):
    with pytest.raises(EngineError):
        call()


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 10**400 * -1),
        ("repetition_window", -1),
        ("seed", -1),
        ("seed", 1 << 63),
        ("seed", 0.5),
    ],
)
def test_bad_settings_name_the_field(field, value):
    with pytest.raises(ConfigError, match=f"^{field} is "):
        Sampling(**{field: value})


def run_stops(stops, pieces):
    matcher, out, stopped = StopStrings(stops), "", False
    for piece in pieces:
        text, stopped = matcher.push(piece)
        out += text
        if stopped:
            break
    return out + matcher.flush(), stopped, matcher.matched


def plain_stop(stops, text):
    """The definition: the first place where some stop string ends, the longest of those that end there."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], True, longest
    return text, False, None


@given(
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("abc\n", max_size=5), max_size=8),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_do_not_depend_on_where_the_text_is_cut(stops, pieces):
    assert run_stops(stops, pieces) == plain_stop(stops, "".join(pieces))


def test_stop_strings_at_every_split():
    text = "one\n\nUs\nUser: two"
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            pieces = [text[:first], text[first:second], text[second:]]
            assert run_stops(["\nUser:", "###"], pieces) == ("one\n\nUs", True, "\nUser:")


def test_stop_strings_hold_back_no_more_than_needed():
    matcher = StopStrings(["END"])
    released = [matcher.push(piece)[0] for piece in ["abc", "E", "N", "E", "x", "EN"]]
    assert released == ["abc", "", "", "EN", "Ex", ""]
    assert matcher.flush() == "EN"
    assert matcher.push("xEND more") == ("x", True)
    assert matcher.push("more") == ("", True) and matcher.flush() == ""
    assert StopStrings([]).push("text") == ("text", False)
    assert StopStrings("one string").matched is None
    for bad in ([""], ["ok", ""], [3]):
        with pytest.raises(ConfigError, match="stop string"):
            StopStrings(bad)
