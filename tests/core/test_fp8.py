"""Linear layers in fp8: what is rounded, by how much, and that nobody gets it without asking."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from accvideo_core import cli
from accvideo_core.dit import DiTConfig, HunyuanVideoDiT
from accvideo_core.dit.fp8 import LARGEST, Fp8Linear, set_linears
from accvideo_core.errors import InvalidValueError
from accvideo_core.media import read_mp4
from tests.networks import THREE_HEADS, error, random_inputs, random_weights

PROMPT = "a red ball moving left on a black background"


def layer(inner: int = 64, outer: int = 48, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inner, outer).requires_grad_(False)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x, row by row scaled to the largest number of e4m3, rounded to its 3 bits of mantissa, in float64: by hand."""
    scale = x.double().abs().amax(-1, keepdim=True) / LARGEST
    value = x.double() / scale
    exponent = torch.floor(torch.log2(value.abs().clamp(min=2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return (value / step).round() * step * scale


def build(config: DiTConfig = THREE_HEADS, dtype: torch.dtype = torch.float32) -> HunyuanVideoDiT:
    network = HunyuanVideoDiT(config, dtype=dtype)
    network.load_state_dict(random_weights(config))
    return network.requires_grad_(False)


class TestLayer:
    def test_weights_and_inputs_are_rounded_row_by_row(self) -> None:
        exact, x = layer(), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
        x[0, 0] *= 1e4
        x[1, 3] *= 1e-4
        expected = linear(rounded(x), rounded(exact.weight), exact.bias.double())
        torch.testing.assert_close(Fp8Linear(exact)(x).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        alone = Fp8Linear(exact)(x[1, 3:4])
        torch.testing.assert_close(Fp8Linear(exact)(x)[1, 3:4], alone)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_errs_by_a_few_percent_and_keeps_the_dtype(self, dtype: torch.dtype) -> None:
        exact, x = layer(512, 256).to(dtype), torch.randn(64, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
        found = Fp8Linear(exact)(x)
        assert found.dtype == dtype and 0.01 < error(found.float(), exact(x).float()) < 0.05

    def test_zeros_give_the_bias(self) -> None:
        exact = layer()
        torch.testing.assert_close(Fp8Linear(exact)(torch.zeros(3, 64)), exact.bias.expand(3, -1))

    def test_it_takes_half_of_bfloat16(self) -> None:
        exact = layer(512, 512).to(torch.bfloat16)
        held = sum(t.nbytes for t in Fp8Linear(exact).state_dict().values())
        assert held < 0.51 * sum(t.nbytes for t in exact.state_dict().values()) + 4 * 512


class TestNetwork:
    def test_layers_of_the_blocks_are_rounded_and_modulations_are_not(self) -> None:
        network = build()
        assert set_linears(network, "fp8") == 2 * 8 + 1 * 2
        kinds = {name: type(module) for name, module in network.named_modules() if isinstance(module, (nn.Linear, Fp8Linear))}
        for name, kind in kinds.items():
            inside = name.startswith(("double_blocks", "single_blocks")) and "mod" not in name
            assert kind is (Fp8Linear if inside else nn.Linear), name

    def test_the_velocity_errs_a_little(self) -> None:
        network, inputs = build(), random_inputs(THREE_HEADS, (1, 3, 6, 10))
        with torch.no_grad():
            exact = network(*inputs)
            set_linears(network, "exact")
            assert torch.equal(network(*inputs), exact)
            set_linears(network, "fp8")
            assert 0.002 < error(network(*inputs), exact) < 0.1

    def test_blocks_compile_whole(self) -> None:
        torch._dynamo.reset()
        network, inputs = build(), random_inputs(THREE_HEADS, (1, 1, 4, 4))
        set_linears(network, "fp8")
        with torch.no_grad():
            expected = network(*inputs)
            for name in network.block_names():
                network.get_submodule(name).compile(fullgraph=True, backend="aot_eager")
            assert error(network(*inputs), expected) < 0.02  # a number that is rounded the other way

    def test_other_networks_and_names_are_refused(self) -> None:
        with pytest.raises(InvalidValueError, match="Linear runs outside our own layers; choose exact"):
            set_linears(layer(), "fp8")
        with pytest.raises(InvalidValueError, match="linears is 'int4'; choose exact or fp8"):
            set_linears(build(), "int4")  # type: ignore[arg-type]


class TestCommands:
    def test_generate_says_so_in_the_video(self, tmp_path: Path) -> None:
        for name, more in (("exact", []), ("fp8", ["--linears", "fp8"])):
            assert cli.main(["generate", PROMPT, "-o", str(tmp_path / f"{name}.mp4"), "--device", "cpu", *more]) == 0
        exact, rough = (read_mp4(tmp_path / f"{name}.mp4") for name in ("exact", "fp8"))
        assert json.loads(rough.metadata["accvideo"])["linears"] == "fp8" and "linears" not in json.loads(
            exact.metadata["accvideo"]
        )
        difference = abs(exact.frames.astype(float) - rough.frames).mean()
        assert 0 < difference < 20

    def test_evaluate_reports_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        plan = tmp_path / "plan.jsonl"
        plan.write_text(json.dumps({"prompt": PROMPT, "seed": 1, "named": {"colour": "red"}}) + "\n")
        assert cli.main(["evaluate", "--plan", str(plan), "--linears", "fp8", "--json", "--device", "cpu"]) == 0
        assert json.loads(capsys.readouterr().out)["linears"] == "fp8"

    def test_sharded_weights_are_not_rounded(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["sample", str(tmp_path), "-o", str(tmp_path), "--shard", "--linears", "fp8"]
        assert cli.main(words) == 2
        assert "leave out --shard, or choose exact" in capsys.readouterr().err
