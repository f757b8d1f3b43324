"""INL beside its language model: losses, phases, training mode and the stand-alone integrators, as recorded."""

import json

import pytest
import torch
from conftest import Case, load_case
from inl_small import REFERENCE, close, folder, recorded
from safetensors.torch import load_file

from thl_engine.errors import ConfigError
from thl_engine.models import inl
from thl_engine.models.inl_modules import (
    AdaptiveIntegratorNeuronLayer,
    IntegratorNeuronLayer,
    MixtureOfIntegrators,
    SharedController,
    SparseHarmonicINL,
)
from thl_engine.ops.backends import load_ops
from thl_engine.ops.weights import Held, trainable
from thl_engine.train.inl_losses import IntegratorLoss, convergence_metrics, cycle_schedule

GRADIENTS = 1e-4  # relative to the largest magnitude of the tensor


def check_losses(losses, case: Case, prefix: str) -> None:
    for name in ("total", "task", "mean", "speed", "energy"):
        key = f"{prefix}{name if name == 'total' else f'L_{name}'}"
        close(getattr(losses, name), case.io[key], what=key)
    assert torch.tensor(losses.lambda_mean) == case.io[f"{prefix}lambda_mean"]


def test_training_mode():
    case, config, _ = recorded("training_mode")
    parameters = {
        b.name: case.weights[b.name].clone().requires_grad_(case.weights[b.name].is_floating_point())
        for b in inl.blocks(config)
    }
    weights, got = trainable(inl.blocks(config), parameters), {}
    logits, _ = inl.forward(
        config, weights, REFERENCE, case.io["input_ids"], inl.init_state(config, 2), got.__setitem__, training=True
    )
    loss = IntegratorLoss(
        target_value=0.0, lambda_mean_init=0.1, lambda_speed=0.01, lambda_energy=0.001, annealing_epochs=10
    )
    last = f"layer{config.num_layers - 1}."
    losses = loss(
        logits.flatten(0, 1),
        case.io["targets"].flatten(),
        got[f"{last}x_trajectory"],
        got[f"{last}v_trajectory"],
        epoch=2,
    )
    losses.total.backward()
    check_losses(losses, case, "loss.")
    close(logits, case.io["logits"])
    for key, expected in case.io.items():
        if key.startswith("layer"):
            close(got[key], expected, what=key)
        elif key.startswith("grad."):
            close(parameters[key.removeprefix("grad.")].grad, expected, GRADIENTS, key)
    without = {name for name, p in parameters.items() if p.requires_grad and p.grad is None}
    assert {name for name in without if name.startswith("shared_controller")} == set(
        case.meta["notes"]["parameters_without_gradient"]
    )


def case_without_weights(name: str) -> Case:
    meta = json.loads((folder(name) / "config.json").read_text())
    return Case(name, meta["config"], meta, {}, load_file(folder(name) / "io.safetensors"))


def test_losses():
    case = case_without_weights("losses")
    for name, setup in case.config["setups"].items():
        loss = IntegratorLoss(**{**case.config["base"], **setup["overrides"]})
        inputs = {key: case.io[key].clone().requires_grad_() for key in ("logits", "x_trajectory", "v_trajectory")}
        mu = case.io["learned_mu"] if "learned_mu" in name else None
        losses = loss(
            inputs["logits"],
            case.io["targets"],
            inputs["x_trajectory"],
            inputs["v_trajectory"],
            setup["epoch"],
            setup["exploration"],
            mu,
        )
        check_losses(losses, case, f"{name}.")
        losses.total.backward()
        for key, value in inputs.items():
            expected = case.io.get(f"{name}.grad_{key}")
            if expected is not None:
                close(value.grad, expected, GRADIENTS, f"{name}.grad_{key}")
    metrics = convergence_metrics(case.io["x_trajectory"], case.config["base"]["target_value"], 0.45)
    assert len(metrics) == 5
    for key, value in metrics.items():
        assert value == pytest.approx(case.io[f"convergence_metrics_eps0.45.{key}"].item(), rel=1e-6), key


def test_a_mean_squared_error_and_rows_that_never_arrive():
    loss = IntegratorLoss(task_loss_type="mse", lambda_speed=0.0, lambda_energy=0.0, lambda_mean_init=0.0)
    still = torch.zeros(3, 5, 2)
    assert loss(torch.ones(3, 2), torch.zeros(3, 2), still, still, 0).total == 1.0
    assert convergence_metrics(still, 1.0, 0.5)["time_to_converge"] == 4.0
    for wrong in ({"task_loss_type": "l1"}, {"annealing_schedule": "cosine"}, {"annealing_epochs": 0}):
        with pytest.raises(ConfigError):
            IntegratorLoss(**wrong)


def test_phases():
    case = case_without_weights("schedule")
    for name, expected in case.meta["expected"].items():
        schedule = cycle_schedule(expected["preset"], expected["overrides"])
        assert schedule.total_epochs == expected["total_epochs"]
        assert [vars(segment) for segment in schedule.segments] == expected["segments"]
        for entry in expected["phases"]:
            phase, values = schedule.phase(entry["epoch"])
            assert (phase, values.lambda_mean, values.excitation_amplitude, phase == "exploration") == (
                entry["phase_name"],
                entry["lambda_mean"],
                entry["excitation_amplitude"],
                entry["is_exploration"],
            ), name
        for key in ("lambda_mean", "excitation_amplitude"):
            assert [getattr(schedule.phase(e)[1], key) for e in range(60)] == case.io[f"{name}.{key}"].tolist()
    for preset, overrides in (
        ("bold", None),
        ("balanced", {"cycles": 3}),
        ("balanced", {"equilibrium_config": {"lambda": 1.0}}),
    ):
        with pytest.raises(ConfigError):
            cycle_schedule(preset, overrides)


# Stand-alone modules.


def module_case(name: str, make) -> tuple[Case, object, dict]:
    """The recorded case, the module that `make` builds from its options, and weights under the published names."""
    case = load_case(folder(name))
    module = make(case.config)
    blocks = module.blocks()
    assert {b.name: b.shape for b in blocks} == {key: tuple(value.shape) for key, value in case.weights.items()}
    return (
        case,
        module,
        {b.name: Held(case.weights[b.name]) if b.kind == "matrix" else case.weights[b.name].float() for b in blocks},
    )


def chosen(kind, options: dict):
    """A module from those published options that are more than initial values."""
    return kind(**{key: value for key, value in options.items() if key in kind.__dataclass_fields__})


def test_shared_controller(backend):
    case, module, weights = module_case("shared_controller", lambda options: SharedController(**options))
    for layer in range(module.num_layers):
        got = module.control(weights, load_ops(backend, "cpu"), case.io["h"], case.io["x"], case.io["v"], layer)
        for key, name in (("alpha", "alpha"), ("beta", "beta"), ("gate", "gate"), ("v_cand", "candidate")):
            close(getattr(got, name), case.io[f"layer{layer}.{key}"], what=key)


@pytest.mark.parametrize("training", [True, False])
def test_sparse_harmonic(training, backend):
    case, module, weights = module_case("sparse_harmonic", lambda options: chosen(SparseHarmonicINL, options))
    ops, prefix = load_ops(backend, "cpu"), "train" if training else "eval"
    h, x, v = (case.io[key] for key in "hxv")
    control = module.control(weights, ops, h, x, v)
    for key in ("alpha", "beta", "gate"):
        close(getattr(control, key), case.io[f"{prefix}.step0.{key}"])
    for t in range(5):
        x, v = module.step(weights, ops, h, x, v, t, training)
        close(x, case.io[f"{prefix}.step{t}.x"])
        close(v, case.io[f"{prefix}.step{t}.v"])


def test_mixture(backend):
    case, module, weights = module_case("mixture", lambda options: chosen(MixtureOfIntegrators, options))
    ops = load_ops(backend, "cpu")
    h, x, v = (case.io[key] for key in "hxv")
    for found, key in zip(
        module.route(weights, ops, h), ("router_probs", "top_k_experts", "expert_weights"), strict=True
    ):
        close(found, case.io[key], what=key)
    for t in range(3):
        x, v = module.step(weights, ops, h, x, v)
        close(x, case.io[f"step{t}.x"])
        close(v, case.io[f"step{t}.v"])


@pytest.mark.parametrize("name", ["neuron_layer", "neuron_layer_static"])
def test_neuron_layer(name, backend):
    case, module, weights = module_case(name, lambda options: chosen(IntegratorNeuronLayer, options))
    ops = load_ops(backend, "cpu")
    for found, key in zip(module.start(weights, 3), ("x", "v"), strict=True):
        close(found, case.io[f"init_state.{key}"])
    h, x, v = (case.io[key] for key in "hxv")
    for t in range(4):
        control, error = module.control(weights, ops, h, x, v), x - weights["mu"]
        inside = {
            "alpha_base": control.alpha,
            "beta": control.beta,
            "gate": control.gate,
            "v_cand": control.candidate,
            "error": error,
            "alpha": module.damping(control.alpha, error),
        }
        x, v = module.step(weights, ops, h, x, v, t)
        for key, found in {**inside, "x": x, "v": v}.items():
            close(found, case.io[f"step{t}.{key}"], what=f"step{t}.{key}")


def test_adaptive_neuron(backend):
    def make(options: dict) -> AdaptiveIntegratorNeuronLayer:
        inner = chosen(IntegratorNeuronLayer, options.pop("inl_layer"))
        return AdaptiveIntegratorNeuronLayer(inner, **options)

    case, module, weights = module_case("adaptive_neuron", make)
    for prefix, stopping in (("auto", True), ("no_stop", False)):
        got = module.run(weights, load_ops(backend, "cpu"), case.io["h"], stopping)
        found = {
            "x_final": got.x,
            "v_final": got.v,
            "iterations_used": got.iterations,
            "converged": got.converged,
            "x_trajectory": got.x_trajectory,
            "v_trajectory": got.v_trajectory,
            "avg_iterations_after": got.avg_iterations,
            "num_forwards_after": got.num_forwards,
        }
        for key, value in found.items():
            close(value, case.io[f"{prefix}.{key}"], what=f"{prefix}.{key}")
        weights |= {"avg_iterations": got.avg_iterations, "num_forwards": got.num_forwards}
