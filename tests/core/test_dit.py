"""The network by itself: its names and sizes, what padding may not do, features, training, compiling."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from accvideo_core.checkpoint import expected_shapes
from accvideo_core.dit import Conditioning, DiTConfig, HunyuanVideoDiT, attention
from accvideo_core.errors import InvalidValueError
from tests.peak import Peak

CONFIG = DiTConfig(hidden_size=128, num_heads=1, depth_double=2, depth_single=2, text_dim=24, pooled_dim=20)
H = 3072


def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def tencent_names() -> dict[str, tuple[int, ...]]:
    """Every tensor of HunyuanVideo-T2V, written out from Tencent's naming and independent of our modules."""
    names: dict[str, tuple[int, ...]] = {"img_in.proj.weight": (H, 16, 1, 2, 2), "img_in.proj.bias": (H,)}
    for stem in ("time_in", "guidance_in", "txt_in.t_embedder"):
        names |= linear(f"{stem}.mlp.0", H, 256) | linear(f"{stem}.mlp.2", H, H)
    names |= linear("vector_in.in_layer", H, 768) | linear("vector_in.out_layer", H, H)
    names |= linear("txt_in.input_embedder", H, 4096)
    names |= linear("txt_in.c_embedder.linear_1", H, 4096) | linear("txt_in.c_embedder.linear_2", H, H)
    for i in range(2):
        block = f"txt_in.individual_token_refiner.blocks.{i}"
        for norm in ("norm1", "norm2"):
            names |= {f"{block}.{norm}.weight": (H,), f"{block}.{norm}.bias": (H,)}
        names |= linear(f"{block}.self_attn_qkv", 3 * H, H) | linear(f"{block}.self_attn_proj", H, H)
        names |= linear(f"{block}.mlp.fc1", 4 * H, H) | linear(f"{block}.mlp.fc2", H, 4 * H)
        names |= linear(f"{block}.adaLN_modulation.1", 2 * H, H)
    for i in range(20):
        for s in ("img", "txt"):
            block = f"double_blocks.{i}.{s}"
            names |= linear(f"{block}_mod.linear", 6 * H, H) | linear(f"{block}_attn_qkv", 3 * H, H)
            names |= {f"{block}_attn_q_norm.weight": (128,), f"{block}_attn_k_norm.weight": (128,)}
            names |= linear(f"{block}_attn_proj", H, H)
            names |= linear(f"{block}_mlp.fc1", 4 * H, H) | linear(f"{block}_mlp.fc2", H, 4 * H)
    for i in range(40):
        block = f"single_blocks.{i}"
        names |= linear(f"{block}.linear1", 7 * H, H) | linear(f"{block}.linear2", H, 5 * H)
        names |= {f"{block}.q_norm.weight": (128,), f"{block}.k_norm.weight": (128,)}
        names |= linear(f"{block}.modulation.linear", 3 * H, H)
    return names | linear("final_layer.linear", 64, H) | linear("final_layer.adaLN_modulation.1", 2 * H, H)


def build(seed: int = 0, config: DiTConfig = CONFIG) -> HunyuanVideoDiT:
    """A network none of whose tensors is trivial."""
    torch.manual_seed(seed)
    network = HunyuanVideoDiT(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2 if parameter.ndim == 1 else 0.02)
    return network


def inputs(lengths: tuple[int, ...] | None = None, batch: int = 2, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, 9, 24, generator=generator)
    mask = None if lengths is None else torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    conditioning = Conditioning(text, torch.randn(batch, 20, generator=generator), torch.full((batch,), 6.0), mask)
    return torch.randn(batch, 16, 2, 6, 4, generator=generator), torch.linspace(1, 0.3, batch), conditioning


class TestNames:
    def test_the_full_network_has_tencents_names_and_shapes(self):
        expected = tencent_names()
        assert len(expected) == 856
        assert expected_shapes(DiTConfig.hunyuan_video()) == expected

    def test_and_12_821_012_544_parameters(self):
        network = HunyuanVideoDiT(DiTConfig.hunyuan_video(), device="meta")
        assert sum(p.numel() for p in network.parameters()) == 12_821_012_544
        assert not list(network.buffers())
        assert all(p.is_meta for p in network.parameters())

    def test_every_linear_layer_comes_from_the_injected_namespace(self):
        made = []

        class Ops:
            def __getattr__(self, kind):
                def make(*args, **kw):
                    made.append(kind)
                    return getattr(torch.nn, kind)(*args, **kw)

                return make

        network = HunyuanVideoDiT(CONFIG, ops=Ops(), device="meta")
        with_weights = [m for m in network.modules() if next(m.parameters(recurse=False), None) is not None]
        without = sum(isinstance(m, torch.nn.LayerNorm) and not m.elementwise_affine for m in network.modules())
        assert len(made) == len(with_weights) + without


class TestPadding:
    """What stands in padded text positions reaches no image token, by any path."""

    @pytest.mark.parametrize("lengths", [(4, 4), (2, 7), (9, 1)], ids=str)
    @pytest.mark.parametrize("junk", [0.0, 100.0, float("inf"), float("nan")])
    def test_padded_values_change_nothing(self, lengths, junk):
        network, (latent, sigma, c) = build(), inputs(lengths)
        assert c.text_mask is not None
        text = c.text.masked_fill(~c.text_mask[..., None], junk)
        with torch.no_grad():
            plain, plain_features = network(latent, sigma, c, features=network.block_names())
            changed = Conditioning(text, c.pooled, c.guidance, c.text_mask)
            junked, junked_features = network(latent, sigma, changed, features=network.block_names())
        assert torch.equal(plain, junked)
        assert all(torch.equal(plain_features[name], junked_features[name]) for name in network.block_names())

    @pytest.mark.parametrize("row_by_row", [False, True])
    def test_a_row_of_a_padded_batch_is_that_row_alone_unpadded(self, monkeypatch, row_by_row):
        if row_by_row:
            # by name: the package's attribute `attention` is the function
            monkeypatch.setattr(importlib.import_module("accvideo_core.dit.attention"), "ROW_BY_ROW_TOKENS", 1)
        network, (latent, sigma, c) = build(), inputs((2, 7))
        with torch.no_grad():
            together = network(latent, sigma, c)
            for row, length in enumerate((2, 7)):
                one = Conditioning(c.text[row : row + 1, :length], c.pooled[row : row + 1], c.guidance[row : row + 1])
                alone = network(latent[row : row + 1], sigma[row : row + 1], one)
                torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)

    def test_valid_text_does_matter(self):
        network, (latent, sigma, c) = build(), inputs((2, 7))
        text = c.text.clone()
        text[1, 6] += 1
        with torch.no_grad():
            a, b = network(latent, sigma, c), network(latent, sigma, Conditioning(text, c.pooled, c.guidance, c.text_mask))
        assert torch.equal(a[0], b[0]) and not torch.allclose(a[1], b[1], atol=1e-3)

    def test_no_token_square_is_ever_built(self):
        """The masked path broadcasts (B, 1, 1, N); the largest boolean tensor seen is that long, not N x N."""
        from torch.utils._python_dispatch import TorchDispatchMode

        largest = 0

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor) and out.dtype == torch.bool:
                    largest = max(largest, out.untyped_storage().nbytes())
                return out

        network, values = build(), inputs((2, 7))
        with torch.no_grad(), Watch():
            network(*values)
        image_tokens = 2 * 3 * 2
        assert 0 < largest <= 2 * (image_tokens + 7)

    def test_masks_that_pad_elsewhere_are_errors(self):
        network, (latent, sigma, c) = build(), inputs((4, 4))
        for mask in (torch.zeros(2, 9, dtype=torch.bool), c.text_mask.flip(1), c.text_mask[:, :5]):
            with pytest.raises(InvalidValueError):
                network(latent, sigma, Conditioning(c.text, c.pooled, c.guidance, mask))


class TestFeatures:
    def test_a_feature_is_the_hidden_state_the_final_layer_would_see(self):
        network, values = build(), inputs()
        seen = []
        network.final_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            velocity, found = network(*values, features=["single_blocks.1", "double_blocks.0"])
            assert torch.equal(velocity, network(*values))
        assert set(found) == {"single_blocks.1", "double_blocks.0"}
        assert torch.equal(found["single_blocks.1"], seen[0]) and found["double_blocks.0"].shape == (2, 12, 128)

    @pytest.mark.parametrize("last", ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"])
    def test_stopping_early_gives_the_same_feature_and_runs_nothing_after(self, last):
        network, values = build(), inputs()
        ran = []
        for name, block in network.named_modules():
            if name in network.block_names() or name == "final_layer":
                block.register_forward_hook(lambda *_, name=name: ran.append(name))
        with torch.no_grad():
            _, full = network(*values, features=[last])
            ran.clear()
            velocity, early = network(*values, features=[last], stop_early=True)
        assert velocity is None and torch.equal(early[last], full[last])
        assert ran == list(network.block_names()[: network.block_names().index(last) + 1])

    def test_a_block_that_does_not_exist_is_an_error(self):
        with pytest.raises(InvalidValueError, match=r"single_blocks\.7"):
            build()(*inputs(), features=["single_blocks.7"])


class TestTraining:
    def gradients(self, network, values):
        network.zero_grad()
        velocity = network(*values)
        (velocity - 1).square().mean().backward()
        return velocity.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    @pytest.mark.parametrize("lengths", [None, (3, 8)], ids=["full", "padded"])
    def test_a_gradient_reaches_every_tensor_that_can_matter(self, lengths):
        """The last double block's text still reaches the single blocks; nothing in the network is without effect."""
        network = build()
        _, gradients = self.gradients(network, inputs(lengths))
        assert set(gradients) == {name for name, _ in network.named_parameters()}
        dead = [name for name, g in gradients.items() if not torch.isfinite(g).all() or not g.any()]
        assert not dead

    def test_the_gradient_is_the_slope(self):
        network, values = build().double(), inputs((3, 8))
        _, gradients = self.gradients(network, values)
        generator = torch.Generator().manual_seed(3)
        step = {name: torch.randn(p.shape, generator=generator).double() for name, p in network.named_parameters()}

        def loss(distance: float) -> float:
            with torch.no_grad():
                for name, p in network.named_parameters():
                    p.add_(step[name], alpha=distance)
                out = float((network(*values).double() - 1).square().mean())
                for name, p in network.named_parameters():
                    p.add_(step[name], alpha=-distance)
            return out

        slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
        assert slope == pytest.approx(float(sum((g * step[name]).sum() for name, g in gradients.items())), rel=2e-2)

    def test_activation_checkpointing_changes_neither_result_nor_gradient(self):
        network, values = build(), inputs((3, 8))
        plain, gradients = self.gradients(network, values)
        network.checkpointing = True
        recomputed, again = self.gradients(network, values)
        assert torch.equal(plain, recomputed)
        for name, gradient in gradients.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)

    def test_checkpointing_does_recompute(self):
        network, values = build(), inputs()
        runs = []
        network.single_blocks[0].linear1.register_forward_hook(lambda *_: runs.append(1))
        network.checkpointing = True
        self.gradients(network, values)
        assert len(runs) == 2

    def test_initialised_it_starts_at_zero_velocity_reproducibly_and_learns(self):
        torch.manual_seed(0)
        network = HunyuanVideoDiT(CONFIG).init_weights(seed=4)
        twin = HunyuanVideoDiT(CONFIG).init_weights(seed=4)
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), twin.parameters(), strict=True))
        values = inputs()
        with torch.no_grad():
            assert not network(*values).any()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        losses = []
        for _ in range(30):
            loss = (network(*values) - values[0]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]


class TestInPlace:
    """What is not to be differentiated is written over what it is made of: the same numbers in half the memory."""

    @pytest.mark.parametrize("lengths", [None, (3, 8)], ids=["full", "padded"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_the_velocity_and_every_feature_are_those_of_a_pass_with_gradients(self, lengths, dtype, monkeypatch):
        config = DiTConfig(hidden_size=256, num_heads=2, depth_double=2, depth_single=2, text_dim=24, pooled_dim=20)
        network = build(config=config).to(dtype)
        generator = torch.Generator().manual_seed(3)
        _, sigma, told = inputs(lengths)
        latent = torch.randn(2, 16, 8, 16, 16, generator=generator)  # 512 tokens: 2**17 numbers in each of q and k
        before = latent.clone(), told.text.clone(), {name: p.detach().clone() for name, p in network.named_parameters()}
        kept, features = network(latent, sigma, told, network.block_names())
        written, copy = [], torch.Tensor.copy_
        monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *args: written.append(self.shape) or copy(self, *args))
        with torch.no_grad():
            velocity, found = network(latent, sigma, told, network.block_names())
        assert sum(shape[-2:] == (512, 128) for shape in written) >= 4  # q and k of the double blocks' images
        limit = 2e-6 if dtype == torch.float32 else 2e-2
        for name, expected in {"velocity": kept, **features}.items():
            value = velocity if name == "velocity" else found[name]
            assert float((value - expected.detach()).norm() / expected.detach().norm()) < limit, name
        assert torch.equal(latent, before[0]) and torch.equal(told.text, before[1])
        assert all(torch.equal(p, before[2][name]) for name, p in network.named_parameters())

    @pytest.mark.parametrize("latent", [(24, 68, 120), (33, 90, 160)], ids=["544p", "720p"])
    def test_a_step_of_the_full_model_needs_little_but_what_its_shapes_require(self, latent):
        """Of the widest layer: its input, q, k, v and the hidden layer side by side, and what was attended."""
        config = DiTConfig(hidden_size=3072, num_heads=24, depth_double=1, depth_single=1, text_dim=4096)
        with FakeTensorMode(), torch.no_grad():
            network = HunyuanVideoDiT(config, dtype=torch.bfloat16)
            given = torch.randn(1, 16, *latent), torch.randn(1, 256, 4096), torch.randn(1, 768), torch.tensor([6.0])
            with Peak([*given, *network.parameters()]) as peak:
                network(given[0], torch.tensor([0.5]), Conditioning(*given[1:]))
        tokens = latent[0] * latent[1] * latent[2] // 4 + 256
        assert peak.peak == pytest.approx((1 + 7 + 1) * tokens * 3072 * 2, rel=0.02)


class TestCompile:
    """Blocks compile whole: fullgraph raises at any graph break. aot_eager traces as the real backend does, and is quick."""

    @pytest.mark.parametrize("lengths", [None, (3, 8)], ids=["full", "padded"])
    def test_every_block_compiles_without_a_graph_break(self, lengths):
        torch._dynamo.reset()
        network, values = build(), inputs(lengths)
        network.attention_kernel = "auto"  # settled before the blocks: what settles it does not compile
        with torch.no_grad():
            expected = network(*values)
            for blocks in (network.double_blocks, network.single_blocks):
                for block in blocks:
                    block.compile(fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(network(*values), expected, rtol=1e-5, atol=1e-5)

    def test_compiled_blocks_train(self):
        torch._dynamo.reset()
        network, values = build(), inputs()
        network(*values).square().mean().backward()
        expected = {name: p.grad.clone() for name, p in network.named_parameters()}
        network.zero_grad()
        for blocks in (network.double_blocks, network.single_blocks):
            for block in blocks:
                block.compile(fullgraph=True, backend="aot_eager")
        network(*values).square().mean().backward()
        for name, p in network.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


class TestBadInput:
    @pytest.mark.parametrize(
        ("shape", "value"),
        [((1, 16, 2, 5, 4), "(2, 5, 4)"), ((1, 4, 2, 4, 4), "(1, 4, 2, 4, 4)"), ((16, 2, 4, 4), "(16, 2, 4, 4)")],
    )
    def test_sizes_are_named(self, shape, value):
        network = HunyuanVideoDiT(CONFIG)
        _, sigma, c = inputs(batch=1)
        with pytest.raises(InvalidValueError) as caught:
            network(torch.zeros(shape), sigma, c)
        assert value in str(caught.value) and "\n" not in str(caught.value)

    def test_guidance_is_asked_for(self):
        latent, sigma, c = inputs()
        with pytest.raises(InvalidValueError, match="guidance"):
            HunyuanVideoDiT(CONFIG)(latent, sigma, Conditioning(c.text, c.pooled))

    def test_an_unknown_kernel_lists_the_known(self):
        q = torch.zeros(1, 1, 2, 4)
        with pytest.raises(InvalidValueError, match="sdpa"):
            attention(q, q, q, kernel="magic")
