"""Checkpoints of other sizes and settings than the recorded ones, against computations written out for the test.

Each variant changes what a config.json can change: widths, heads, eps, rotary base, merging of tiles, windows, taps,
injected layers, sigma, LoRA rank. Towers and decoders of the references are those of `transformers`.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from model_server.checkpoints.__main__ import app
from model_server.checkpoints.adapters import fusar, mfrsvlm, rsunivlm
from model_server.checkpoints.published import Plan
from model_server.model.llava import IMAGE
from model_server.model.modulation import Anchors

transformers = pytest.importorskip("transformers")

TEXT = {
    "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 3,
    "intermediate_size": 40, "rms_norm_eps": 1e-3, "rope_theta": 50000.0, "vocab_size": 70, "hidden_act": "silu",
    "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip


def write(folder: Path, config: dict[str, Any], shapes: Plan, leave: str = " ") -> dict[str, Tensor]:
    """A checkpoint of random tensors of a plan's names, but those that begin with `leave`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(pieces[0].shape, generator=generator) * 0.2 + ("norm" in name and name.endswith("weight"))
        for name, pieces in shapes.items()
    }
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(leave)}
    save_file(kept, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def projected(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    own = part(tensors, "model.mm_projector.")
    return F.linear(F.gelu(F.linear(x, own["0.weight"], own["0.bias"])), own["2.weight"], own["2.bias"])


# --- RSUniVLM: tiles, newline, eps, rotary base, grouped heads -------------------------------------------------------


def merged(base: Tensor, tiles: Tensor, newline: Tensor, size: tuple[int, int], columns: int, rows: int,
           most: int) -> Tensor:  # fmt: skip
    """`spatial_unpad`, one token after another: overview; then the grid of tiles, less padding, a newline each row."""
    side, (width, height) = 27, size
    across, down = columns * side, rows * side
    places = [(y, x) for y in range(down) for x in range(across)]
    cells = [tiles[(y // side) * columns + x // side, (y % side) * side + x % side] for y, x in places]
    grid = torch.stack(cells).unflatten(0, (down, across))
    if width / height > across / down:
        pad = (down - int(height * (across / width))) // 2
        grid = grid[pad : down - pad]
    else:
        pad = (across - int(width * (down / height))) // 2
        grid = grid[:, pad : across - pad]
    times = math.sqrt(grid.shape[0] * grid.shape[1] / (most * side**2))
    if times > 1.1:
        smaller = [int(grid.shape[0] // times), int(grid.shape[1] // times)]
        grid = F.interpolate(grid.permute(2, 0, 1)[None], smaller, mode="bilinear")[0].permute(1, 2, 0)
    return torch.cat([base, *(torch.cat((row, newline[None])) for row in grid)])


@pytest.mark.parametrize(
    ("size", "grid", "most", "tied"), [((700, 100), (2, 1), 9, True), ((760, 400), (2, 2), 1, False)]
)
def test_rsunivlm_with_tiles_newlines_and_other_sizes(
    tmp_path: Path, size: tuple[int, int], grid: tuple[int, int], most: int, tied: bool
) -> None:
    vision = {
        "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 30, "image_size": 55,
        "patch_size": 2, "layer_norm_eps": 1e-4,
    }  # fmt: skip
    text = {**TEXT, "tie_word_embeddings": tied}
    config = {
        **text, "model_type": "llava_qwen_gmoe", "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "tower",
        "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": f"anyres_max_{most}",
        "image_grid_pinpoints": "(1x1),...,(3x3)", "tokenizer_padding_side": "right" if tied else "left",
    }  # fmt: skip
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "tower").mkdir(parents=True)
    (checkpoint / "tower" / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": vision}))
    tensors = write(checkpoint, config, rsunivlm.plan(rsunivlm.read_config(checkpoint, config)))

    cut = {**vision, "num_hidden_layers": 2, "vision_use_head": False}  # the last layer is dropped
    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**cut)).eval()
    found = part(tensors, rsunivlm.TOWER)
    fits = {name.removeprefix("vision_model."): name for name in tower.state_dict()}
    tower.load_state_dict({fits[name]: t for name, t in found.items()}, strict=False)
    torch.manual_seed(0)
    columns, down = grid
    tiled, single = torch.randn(1 + columns * down, 3, 55, 55), torch.randn(3, 55, 55)
    inputs = {
        "tiles": ([3, 4, IMAGE, 5, 6], [tiled], [size]),
        "text": ([8, 9, 10], [], None),
    }
    if tied:
        inputs["mixed"] = ([IMAGE, 7, IMAGE], [single, tiled], [(55, 55), size])
    tensor: dict[str, Tensor] = {}
    index: dict[str, Any] = {"inputs": {}, "cases": [], "small_positions": {}}
    rows: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, (ids, images, sizes) in inputs.items():
            row = torch.empty(0, 48)
            states = [tower(x.view(-1, 3, 55, 55), output_hidden_states=True).hidden_states[-1] for x in images]
            pictures = [
                merged(x[0], x[1:], tensors["model.image_newline"], size, columns, down, most)
                if len(x) > 1 else torch.cat((x[0], tensors["model.image_newline"][None]))
                for x in (projected(tensors, state) for state in states)
            ]  # fmt: skip
            shown = iter(pictures)
            for i in ids:
                row = torch.cat((row, next(shown) if i == IMAGE else tensors["model.embed_tokens.weight"][i][None]))
            tensor |= {f"in/{name}/image{i}": image for i, image in enumerate(images)}
            if states:
                tensor[f"in/{name}/tower"] = torch.cat(states)
                tensor[f"in/{name}/projector"] = projected(tensors, torch.cat(states))
            tensor[f"in/{name}/inputs_embeds"] = row[None]
            index["inputs"][name] = {"input_ids": ids, "n_images": len(images), "image_sizes": sizes}
            for granularity in (0, 2) if name == "text" else (1,):
                ended = generated(qwen2(text, tensors, granularity), row, 3 if name == "text" else 1)
                case = f"{name}/g{granularity}"
                tensor |= {f"out/{case}/{key}": value for key, value in ended.items()}
                index["cases"].append(
                    {"name": case, "input": name, "granularity": granularity, "light": False,
                     "generated_ids": ended["generated"][0].tolist()}
                )  # fmt: skip
            rows[name] = row
        together = [rows["tiles"], rows["text"]]
        last = [qwen2(text, tensors, 1)(inputs_embeds=row[None]).logits[0, -1] for row in together]
        lengths, short = [len(row) for row in together], [0] * 2
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        tensor |= {"batch/logits_last_valid": torch.stack(last)}
        tensor |= {"batch/attention_mask_merged": (real if tied else real.flip(1)).long()}
        index["batch"] = {
            "input_ids": [inputs["tiles"][0], [*inputs["text"][0], *short]], "granularity": 1,
            "attention_mask": [[1] * 5, [1, 1, 1, 0, 0]], "images": ["in/tiles/image0"], "merged_lengths": lengths,
        }  # fmt: skip
    save_file({name: t.clone().contiguous() for name, t in tensor.items()}, tmp_path / "cases.safetensors")
    (tmp_path / "cases.json").write_text(json.dumps(index))
    verified(tmp_path)


def qwen2(text: dict[str, Any], tensors: dict[str, Tensor], expert: int) -> Any:
    """`transformers`' Qwen2 with the feed-forward layers of one expert."""
    decoder = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**text, attn_implementation="eager")).eval()
    chosen = {
        name.replace(f".mlp.{expert}.", ".mlp."): t
        for name, t in tensors.items()
        if ".mlp." not in name or f".mlp.{expert}." in name
    }
    missing = decoder.load_state_dict(chosen, strict=False).missing_keys
    assert missing == (["lm_head.weight"] if text["tie_word_embeddings"] else [])
    return decoder


def generated(decoder: Any, row: Tensor, steps: int) -> dict[str, Tensor]:
    """What was recorded of a case: layers and logits of a sequence [T, D], and greedy decoding by whole passes."""
    layers = [layer.register_forward_hook(_kept) for layer in decoder.model.layers]
    out = decoder(inputs_embeds=row[None], output_hidden_states=True, use_cache=False)
    found = {f"hidden_layer{i}": layer.kept for i, layer in enumerate(decoder.model.layers)}
    for handle in layers:
        handle.remove()
    found |= {"hidden_norm": out.hidden_states[-1], "logits": out.logits}
    ids, logits = [], []
    for _ in range(steps):
        logits.append(decoder(inputs_embeds=row[None], use_cache=False).logits[0, -1])
        ids.append(int(logits[-1].argmax()))
        row = torch.cat((row, decoder.get_input_embeddings()(torch.tensor(ids[-1:]))))
    return {**found, "generated": torch.tensor([ids]), "step_logits": torch.stack(logits)}


def _kept(layer: Any, _: Any, output: Any) -> None:
    layer.kept = output[0] if isinstance(output, tuple) else output


def verified(folder: Path) -> None:
    """The command passes, and compares all that was recorded."""
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == 0, result.output
    assert "recorded but not compared" not in result.output, result.output


# --- MF-RSVLM: windows, taps, injected layers ------------------------------------------------------------------------


def stacks_of(tower: Any, image: Tensor, patch: int, sides: list[int], taps: list[int]) -> Tensor:
    """The raw detail stacks [K, V, W] of one image [1, 3, H, W]; sides: tokens a side of a window at each scale."""
    base = 336 // patch
    canvas = F.interpolate(image, (672, 672), mode="bilinear", align_corners=False)[0]
    found = []
    for side in sides:
        window, step = side * patch, side // 2 * patch
        n = 1 + (672 - window) // step
        planes = [
            canvas[c, y * step : y * step + window, x * step : x * step + window]
            for c in range(3) for y in range(n) for x in range(n)
        ]  # fmt: skip
        windows = torch.stack(planes).view(-1, 3, window, window)
        if window != 336:
            windows = F.interpolate(windows, (336, 336), mode="bilinear", align_corners=False)
        states = tower(windows, output_hidden_states=True).hidden_states
        hann = torch.hann_window(side, periodic=False)
        for tap in taps:
            tokens = states[tap][:, 1:].unflatten(1, (base, base))
            pool = base // side
            tokens = tokens.unflatten(2, (side, pool)).unflatten(1, (side, pool)).mean((2, 4))
            whole, total = torch.zeros(2 * base, 2 * base, tokens.shape[-1]), torch.zeros(2 * base, 2 * base, 1)
            for k in range(n * n):
                top, left = k // n * (side // 2), k % n * (side // 2)
                weight = torch.outer(hann, hann)[..., None]
                whole[top : top + side, left : left + side] += tokens[k] * weight
                total[top : top + side, left : left + side] += weight
            whole = whole / total.clamp(min=1e-6)
            found += [whole[r::2, c::2].flatten(0, 1) for r in (0, 1) for c in (0, 1)]
    return torch.stack(found)


def injected(own: dict[str, Tensor], rank: int, hidden: Tensor, stacks: Tensor) -> Tensor:
    """One injection by the paper's equations; hidden [V, D], stacks [K, V, D]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, own[f"{name}.weight"], own[f"{name}.bias"])

    query = linear(norm(hidden.mean(0), f"router_query.{rank}.0"), f"router_query.{rank}.1")
    keys = linear(norm(stacks.mean(1), f"router_key.{rank}.0"), f"router_key.{rank}.1")
    weights = (keys @ query / math.sqrt(hidden.shape[-1])).softmax(0)
    mixed = norm((weights[:, None, None] * stacks).sum(0), f"detail_norms.{rank}")
    gate = linear(torch.cat((norm(hidden, f"hidden_norms.{rank}"), mixed), -1), f"gate_proj.{rank}").sigmoid()
    return hidden + own["residual_scale"][rank] * gate * linear(mixed, f"detail_proj.{rank}")


@pytest.mark.parametrize(
    ("patch", "given", "sides", "aspect"), [(24, [0.5, 1.0], [7, 14], "square"), (56, [0.4], [6, 2], "pad")]
)
def test_mf_rsvlm_with_other_windows_taps_layers_and_grouped_heads(
    tmp_path: Path, patch: int, given: list[float], sides: list[int], aspect: str
) -> None:
    """0.5 of 14 tokens are 7, an odd number; 0.4 of 6 are 2.4, so 2, and the full scale then comes first."""
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3,
        "intermediate_size": 30, "image_size": 336, "patch_size": patch, "hidden_act": "gelu", "layer_norm_eps": 1e-4,
    }  # fmt: skip
    config = {
        **TEXT, "model_type": "vhm", "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "tower",
        "mm_vision_select_layer": [-2], "image_aspect_ratio": aspect, "deepstack_window_scales": given,
        "deepstack_detail_layers": [0.75, -3, 1.0], "deepstack_injection_layers": [2, 0, 9],
    }  # fmt: skip
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "tower").mkdir(parents=True)
    (checkpoint / "tower" / "config.json").write_text(json.dumps(vision))
    (checkpoint / "tower" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    ours = mfrsvlm.read_config(config, {}, checkpoint / "tower")
    tensors = write(checkpoint, config, mfrsvlm.plan(ours), leave=mfrsvlm.TOWER)
    save_file({n: t for n, t in tensors.items() if n.startswith(mfrsvlm.TOWER)},
              checkpoint / "tower" / "model.safetensors")  # fmt: skip

    clip = {name: value for name, value in vision.items() if name != "model_type"}
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**clip)).eval()
    fits = {name.removeprefix("vision_model."): name for name in tower.state_dict()}
    tower.load_state_dict({fits[n]: t for n, t in part(tensors, mfrsvlm.TOWER).items()}, strict=False)
    decoder = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, attn_implementation="eager")).eval()
    assert not decoder.load_state_dict(tensors, strict=False).missing_keys
    torch.manual_seed(0)
    ids = {"ids1": [1, 5, IMAGE, 6], "ids_text": [1, 7, 8]}
    image = torch.randn(1, 3, 112, 56)  # higher than wide
    view = F.interpolate(image, (336, 336), mode="bilinear", align_corners=False)
    if aspect == "pad":
        view = torch.tensor([0.1, 0.2, 0.3])[None, :, None, None].repeat(1, 1, 336, 336)
        view[..., 84:252] = F.interpolate(image, (336, 168), mode="bilinear", align_corners=False)
    own = part(tensors, "model.deepstack_")
    with torch.no_grad():
        raw = tower(view, output_hidden_states=True).hidden_states[-2][:, 1:]
        tokens = projected(tensors, raw)
        # Taps: 0.75 * 4, 4 - 3 and the last.
        taken = stacks_of(tower, image, patch, sides, [1, 3, 4])
        stacks = projected(tensors, taken)
        visual = tokens.shape[1]
        recorded = {"ids_text": generated(decoder, decoder.get_input_embeddings()(torch.tensor(ids["ids_text"])), 3)}
        for rank, layer in enumerate((0, 2)):  # the list holds a 0: it counts from there; 9 is none of three
            decoder.model.layers[layer].register_forward_pre_hook(
                lambda _, args, rank=rank: (
                    torch.cat((injected(own, rank, args[0][0, :visual], stacks), args[0][0, visual:]))[None], *args[1:],
                )
            )  # fmt: skip
        row = torch.cat((tokens[0], decoder.get_input_embeddings()(torch.tensor([1, 5, 6]))))
        recorded["ids1"] = generated(decoder, row, 3)
    listed = {}
    for case, name in (("c1", "ids1"), ("c6", "ids_text")):
        found = recorded[name]
        tensor = {f"layer{i}.out": found[f"hidden_layer{i}"] for i in range(3)}
        tensor |= {"final_norm": found["hidden_norm"], "logits": found["logits"]}
        tensor |= {"greedy_ids": found["generated"], "greedy_step_logits": found["step_logits"][None]}
        tensor["greedy_sequences"] = torch.tensor([[*ids[name], *found["generated"][0].tolist()]])
        if case == "c1":
            tensor |= {"inputs_embeds": row[None], "global_raw": raw, "global_proj": tokens}
        listed[case] = tensor
    listed["stacks_raw_c1"] = {f"stack{i:02d}": stack for i, stack in enumerate(taken)}
    listed["stacks_proj_c1"] = {f"stack{i:02d}": stack for i, stack in enumerate(stacks)}
    for case, tensor in listed.items():
        save_file({n: t.clone().contiguous() for n, t in tensor.items()}, tmp_path / f"{case}.safetensors")
    given_ids = {name: torch.tensor([row]) for name, row in ids.items()}
    save_file({**given_ids, "px1": image}, tmp_path / "inputs.safetensors")
    about = {"cases": {case: {"file": f"{case}.safetensors"} for case in listed}}
    (tmp_path / "cases.json").write_text(json.dumps(about))
    verified(tmp_path)


# --- FUSAR-GPT: sigma, width of the modulation, LoRA rank ------------------------------------------------------------


def test_fusar_with_another_sigma_width_and_lora_rank(oracles: Path, tmp_path: Path) -> None:
    for name in ("base", "adapter"):
        shutil.copytree(oracles / "fusar" / "a" / name, tmp_path / name, copy_function=shutil.copyfile)
    adapter, width, rank, alpha, sigma = tmp_path / "adapter", 32, 3, 7, 1.25
    hidden = 5 * width
    film = {"0.weight": torch.randn(hidden, 64) * 0.3, "0.bias": torch.randn(hidden) * 0.1,
            "2.weight": torch.randn(2 * width, hidden) * 0.1, "2.bias": torch.randn(2 * width) * 0.1}  # fmt: skip
    torch.save({"film_mlp": film, "score": torch.ones(1)}, adapter / "vec64_film.pt")
    tlm = json.loads((adapter / "tlm_config.json").read_text())
    tlm |= {"sigma": sigma, "hidden_mult": 5, "image_size": 140}
    (adapter / "tlm_config.json").write_text(json.dumps(tlm))
    lora = {name: torch.randn(rank, t.shape[1]) * 0.1 if "lora_A" in name else torch.randn(t.shape[0], rank) * 0.1
            for name, t in load_file(adapter / "adapter_model.safetensors").items()}  # fmt: skip
    save_file(lora, adapter / "adapter_model.safetensors")
    described = json.loads((adapter / "adapter_config.json").read_text()) | {"r": rank, "lora_alpha": alpha}
    (adapter / "adapter_config.json").write_text(json.dumps(described))

    model, report = fusar.load(tmp_path)
    assert report.fits
    assert model.config.image_size == 140
    base = load_file(tmp_path / "base" / "model.safetensors")
    target = "base_model.model.model.language_model.layers.1.mlp.down_proj."
    wanted = base["model.layers.1.mlp.down_proj.weight"]
    wanted = wanted + alpha / rank * lora[f"{target}lora_B.weight"] @ lora[f"{target}lora_A.weight"]
    torch.testing.assert_close(model.state_dict()["decoder.blocks.1.experts.experts.0.down.weight"], wanted)

    side, vectors, places = 10, torch.randn(3, 64), torch.tensor([[0.1, 0.2], [0.5, 0.9], [1.0, 0.0]])
    patches = torch.randn(side * side, 1176)
    steps = torch.arange(side)
    with torch.no_grad():
        plain = model.tower(patches, [(side, side)])
        hid = F.silu(F.linear(vectors, film["0.weight"], film["0.bias"]))
        gamma, beta = F.linear(hid, film["2.weight"], film["2.bias"]).chunk(2, -1)
        far = (places[:, :1] * (side - 1) - steps).square()[:, :, None]
        far = far + (places[:, 1:] * (side - 1) - steps).square()[:, None]
        weights = torch.exp(-far / (2 * sigma**2))
        for _ in range(2):
            weights = weights / (weights.sum(0) + 1e-6)
        fields = [torch.einsum("shw,sc->chw", weights, x)[None] for x in (gamma, beta)]
        scale, shift = (F.interpolate(x, (5, 5), mode="bilinear", align_corners=False)[0].flatten(1).T for x in fields)
        found = model.encode(patches, [(side, side)], Anchors.of([(vectors, places)], 64))[0]
    torch.testing.assert_close(found, plain * (1 + scale) + shift, atol=1e-4, rtol=1e-4)
