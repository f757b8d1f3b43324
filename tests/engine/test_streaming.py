"""Every architecture through the engine: streamed equals resident bit for bit, and reads what its walk says."""

import pytest
import torch
from conftest import MODELS, configured

from thl_engine import Engine


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("model", MODELS)
def test_streamed_equals_resident(model, quantize, backend):
    config, weights = configured(model)
    options = dict(device="cpu", backend=backend, quantize=quantize)
    resident = Engine.from_state_dict(model, config, weights, **options)
    tokens = torch.randint(resident.config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(4))

    def outputs(engine: Engine) -> list[torch.Tensor]:
        logits, state = engine.prefill(tokens, engine.new_state())
        out = [logits]
        for _ in range(6):
            logits, state = engine.step(logits.argmax(dim=-1), state)
            out.append(logits)
        logits, _ = engine.forward(tokens)
        logits_again, state = engine.step(tokens[:, 0], state)
        return [*out, logits, logits_again]

    expected = outputs(resident)
    whole = resident.plan().peak_memory_bytes
    least = Engine.from_state_dict(model, config, weights, stream=True, **options).plan().least_budget
    for budget in (least, least + (whole - least) // 3, least + 2 * (whole - least) // 3):
        with Engine.from_state_dict(model, config, weights, stream=True, memory_budget=budget, **options) as engine:
            for got, wanted in zip(outputs(engine), expected, strict=True):
                assert torch.equal(got, wanted), budget
            assert engine.stats()["page_misses"] > 0
