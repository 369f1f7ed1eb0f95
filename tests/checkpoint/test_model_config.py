"""Settings as other versions of transformers write them reach mlx-lm, or are refused.

What is expected is computed by stock mlx-lm from a config of the older form.
"""

import json

import pytest

from quantkit.backend import mx
from quantkit.checkpoint.generic import build_model
from quantkit.checkpoint.model_config import mlx_quantization, stated_dtype, with_rope_settings
from quantkit.checkpoint.source import open_source
from quantkit.errors import SourceError
from quantkit.evaluation.verify import verify
from quantkit.planning.recipe import load_recipe, plan_by_recipe
from quantkit.publish.record import read_report
from quantkit.streaming.attention import attention_differences, attention_settings
from tests.support import tiny
from tests.support.families import GEMMA, LLAMA
from tests.support.repo import write_repo

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PLAIN = {"rope_type": "default"}
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")


def by_type(settings, **other):
    return {"full_attention": settings, "sliding_attention": {**settings, **other}}


# form -> the keys of a config that mean `theta` and `scaling`
FORMS = {
    "transformers 4": lambda t, s: {"rope_theta": t, "rope_scaling": s},
    "transformers 4, type": lambda t, s: {
        "rope_theta": t, "rope_scaling": {"type": s["rope_type"], **s},
    },
    "transformers 5": lambda t, s: {"rope_parameters": {**s, "rope_theta": t}},
    "theta outside": lambda t, s: {"rope_theta": t, "rope_parameters": s},
    "theta in both": lambda t, s: {"rope_theta": t, "rope_parameters": {**s, "rope_theta": t}},
    "scaling null": lambda t, s: {
        "rope_scaling": None, "rope_theta": None, "rope_parameters": {**s, "rope_theta": t},
    },
    "scaling empty": lambda t, s: {
        "rope_scaling": {}, "rope_parameters": {**s, "rope_theta": t},
    },
    "parameters null": lambda t, s: {
        "rope_theta": t, "rope_scaling": s, "rope_parameters": None,
    },
    "parameters empty": lambda t, s: {"rope_theta": t, "rope_scaling": s, "rope_parameters": {}},
    "theta inside scaling": lambda t, s: {"rope_scaling": {**s, "rope_theta": t}},
    "both": lambda t, s: {
        "rope_theta": t, "rope_scaling": s, "rope_parameters": {**s, "rope_theta": t},
    },
    "by layer type": lambda t, s: {"rope_parameters": by_type({**s, "rope_theta": t})},
    "by layer type, theta outside": lambda t, s: {
        "rope_theta": t, "rope_parameters": by_type(s),
    },
    "by layer type, in scaling": lambda t, s: {
        "rope_theta": t, "rope_scaling": by_type(s),
    },
}  # fmt: skip
BASES = {
    "gpt_oss": {k: v for k, v in tiny.CONFIG.items() if k not in ROPE_KEYS},
    "llama": {k: v for k, v in LLAMA.items() if k not in ROPE_KEYS}
    | {"max_position_embeddings": 512},
    "qwen3": {k: v for k, v in LLAMA.items() if k not in ROPE_KEYS}
    | {"max_position_embeddings": 512, "model_type": "qwen3", "head_dim": 32},
}


def rotations(config):
    """What the RoPE module of every layer of stock mlx-lm's model makes of ones."""
    model = build_model(config)
    x = mx.ones((1, 1, 4, 32))
    return [layer.self_attn.rope(x, offset=100).tolist() for layer in model.layers]


def rotate_alike(a, b):
    return all(mx.allclose(mx.array(x), mx.array(y)).item() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("scaling", [YARN, LLAMA3, PLAIN], ids=lambda s: s["rope_type"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_rope_settings_of_every_form_reach_mlx_lm(form, base, scaling):
    theta = 150000.0
    older = {**BASES[base], "rope_theta": theta, "rope_scaling": scaling}
    config = {**BASES[base], **FORMS[form](theta, scaling)}
    found = with_rope_settings(config)
    assert rotate_alike(rotations(found), rotations(older))
    assert attention_differences(attention_settings(config), build_model(found)) == []
    assert with_rope_settings(found) == found


@pytest.mark.parametrize("form", FORMS)
def test_losing_what_is_asked_for_is_found(form):
    """The second reading of the config understands every form by itself."""
    config = {**BASES["gpt_oss"], **FORMS[form](150000.0, YARN)}
    lost = build_model({**BASES["gpt_oss"], "rope_theta": 150000.0})
    other = build_model({**BASES["gpt_oss"], "rope_theta": 10000.0, "rope_scaling": YARN})
    for model in (lost, other):
        found = attention_differences(attention_settings(config), model)
        assert len(found) == 4
        assert "layer 0: the config specifies rope_theta 150000, yarn scaling" in found[0]


GEMMA_LAYERS = {
    **GEMMA,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_theta": None,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}


def test_layer_types_with_settings_of_their_own():
    """Gemma 3 has one base for sliding layers, and another, with scaling, for full ones."""
    older = {**GEMMA_LAYERS, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": LINEAR}
    settings = {
        "full_attention": {**LINEAR, "rope_theta": 1e6},
        "sliding_attention": {**PLAIN, "rope_theta": 1e4},
    }
    config = {**GEMMA_LAYERS, "rope_parameters": settings}
    found = with_rope_settings(config)
    assert rotate_alike(rotations(found), rotations(older))
    assert not rotate_alike(rotations(found)[:1], rotations(found)[1:])
    for asked in (config, older):
        assert attention_differences(attention_settings(asked), build_model(found)) == []
        swapped = build_model({**older, "rope_local_base_freq": 2e4})
        assert len(attention_differences(attention_settings(asked), swapped)) == 1


def test_layer_types_that_mlx_lm_does_not_tell_apart_are_refused(tmp_path):
    settings = by_type({**YARN, "rope_theta": 150000.0}, rope_theta=10000.0)
    source = tiny.write_gpt_oss(
        tmp_path / "src", config={**tiny.CONFIG, "rope_scaling": None, "rope_parameters": settings}
    )
    with pytest.raises(SourceError, match="layer 0: the config specifies rope_theta 10000"):
        rewritten(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_measured_of_a_model_that_mlx_lm_builds_otherwise(cli, checkpoint, tmp_path):
    settings = by_type({**YARN, "rope_theta": 150000.0}, rope_theta=10000.0)
    config = {**tiny.CONFIG, "rope_scaling": None, "rope_parameters": settings}
    source = tiny.write_gpt_oss(tmp_path / "src", config=config)
    for command in (("profile", source, "-o", tmp_path / "out"), ("compare", source, checkpoint)):
        done = cli(*command)
        assert done.exit_code == 2, done.output
        assert "the config specifies rope_theta 10000" in done.stderr
    assert not list(tmp_path.glob("out*"))


def nested(change):
    """A text model inside of a wrapper: its settings in text_config."""
    text = {k: v for k, v in BASES["llama"].items() if k != "eos_token_id"} | change
    return {"model_type": "mistral3", "text_config": {**text, "model_type": "ministral3"}}


@pytest.mark.parametrize("form", ["transformers 4", "transformers 5", "theta outside"])
def test_a_nested_text_config_keeps_its_own(form):
    found = with_rope_settings(nested(FORMS[form](150000.0, YARN)))
    assert found["text_config"]["rope_theta"] == 150000.0
    assert found["text_config"]["rope_scaling"] == YARN
    assert "rope_theta" not in found


def rewritten(source, out, recipe="mxfp4-q8"):
    opened = open_source(str(source))
    return write_repo(opened, plan_by_recipe(opened.inventory, load_recipe(recipe)), out)


@pytest.mark.parametrize("form", FORMS)
def test_a_repo_of_any_form_is_right(tmp_path, form):
    """Through the whole of quantize, into stock mlx-lm: the older form's logits, and verified."""
    import mlx_lm

    def logits(config, name):
        source = tiny.write_gpt_oss(tmp_path / f"{name}-src", config=config)
        rewritten(source, tmp_path / name)
        model, _ = mlx_lm.load(str(tmp_path / name))
        return model(mx.arange(40)[None] % 64)

    theta = 150000
    expected = logits({**tiny.CONFIG, "rope_theta": theta, "rope_scaling": YARN}, "older")
    base = {key: value for key, value in tiny.CONFIG.items() if key not in ROPE_KEYS}
    assert mx.array_equal(logits({**base, **FORMS[form](theta, YARN)}, "newer"), expected).item()
    checks = list(verify(tmp_path / "newer", read_report(tmp_path / "newer"), load=False))
    assert all(check.ok is not False for check in checks), checks


def test_verify_finds_what_was_lost(tmp_path):
    """A repo whose config and report agree, but not with what the source asks for."""
    source = tiny.write_gpt_oss(tmp_path / "src", config={**tiny.CONFIG, "rope_scaling": YARN})
    rewritten(source, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_scaling": None}))
    report = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    from quantkit.storage.hashing import hash_file

    for file in report["files"]:
        if file["name"] == "config.json":
            file.update(sha256=hash_file(path, path.name), size=path.stat().st_size)
    (tmp_path / "out" / "quantkit.json").write_text(json.dumps(report))
    checks = {c.name: c for c in verify(tmp_path / "out", read_report(tmp_path / "out"))}
    assert [name for name, check in checks.items() if check.ok is False] == [
        "attention as the source's"
    ]
    assert "specifies rope_theta 10000, yarn scaling" in checks["attention as the source's"].detail


WINDOWS = {
    "another window": ({"sliding_window": 8}, "window is 16; mlx-lm's 8"),
    "other layer types": (
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        "the config says sliding_attention; mlx-lm builds the other kind",
    ),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_are_compared(case):
    changed, message = WINDOWS[case]
    found = attention_differences(
        attention_settings(tiny.CONFIG), build_model({**tiny.CONFIG, **changed})
    )
    assert message in found[0]


BAD_ROPE = {
    "a type that mlx-lm does not know": {"rope_type": "spiral", "factor": 2.0},
    "no factor": {"rope_type": "yarn"},
}


@pytest.mark.parametrize("case", BAD_ROPE)
def test_settings_that_mlx_lm_cannot_build_are_refused_before_anything_is_written(
    refused, tmp_path, case
):
    config = {**tiny.CONFIG, "rope_scaling": BAD_ROPE[case]}
    message = refused(tiny.write_gpt_oss(tmp_path / "src", config=config))
    assert "config.json: mlx-lm cannot build model_type 'gpt_oss'" in message


DTYPES = [
    ({"torch_dtype": "bfloat16"}, "BF16"),
    ({"dtype": "float16"}, "F16"),
    ({"torch_dtype": "torch.float32"}, "F32"),
    ({"torch_dtype": None, "dtype": "bfloat16"}, "BF16"),
    ({"text_config": {"dtype": "bfloat16"}}, "BF16"),
    ({"text_config": {"torch_dtype": "float16"}}, "F16"),
    ({"torch_dtype": "auto"}, None),
    ({"torch_dtype": None}, None),
    ({}, None),
]


@pytest.mark.parametrize(("config", "expected"), DTYPES)
def test_float_types_of_every_form(config, expected):
    assert stated_dtype(config) == expected


@pytest.mark.parametrize("value", [None, {}])
def test_no_quantization_is_none(tmp_path, checkpoint, value):
    assert mlx_quantization({"quantization": value}) is None
    source = tiny.write_gpt_oss(tmp_path / "src", config={**tiny.CONFIG, "quantization": value})
    rewritten(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["bits"]


@pytest.mark.parametrize("value", [[], "mxfp4", 4])
def test_quantization_that_is_no_object(refused, tmp_path, value):
    source = tiny.write_gpt_oss(tmp_path / "src", config={**tiny.CONFIG, "quantization": value})
    assert "config.json: quantization is not an object" in refused(source)


FAMILIES = {
    "OLMo 3 scales full attention only": {
        "model_type": "olmo3",
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "num_hidden_layers": 4,
        "sliding_window": 16,
        "rope_scaling": YARN,
    },
    "Phi 3 has a length beside its scaling": {
        "model_type": "phi3",
        "original_max_position_embeddings": 16,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 16,
            "long_factor": [2.0] * 16,
        },
    },
    "GLM 4 rotates a part": {
        "model_type": "glm4",
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
    },
    "SmolLM 3 rotates some layers": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "Qwen 2 states a window that it does not use": {
        "model_type": "qwen2",
        "sliding_window": 16,
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * 2,
        "rope_scaling": YARN,
    },
}


@pytest.mark.parametrize("case", FAMILIES)
def test_families_with_ways_of_their_own_are_no_false_alarm(case):
    config = {**BASES["llama"], "rope_theta": 150000.0, **FAMILIES[case]}
    model = build_model(with_rope_settings(config))
    assert attention_differences(attention_settings(config), model) == []
    newer = {key: value for key, value in config.items() if key not in ROPE_KEYS}
    scaling = config.get("rope_scaling") or PLAIN
    newer["rope_parameters"] = {**scaling, "rope_theta": 150000.0}
    model = build_model(with_rope_settings(newer))
    assert attention_differences(attention_settings(newer), model) == []


def test_scaling_that_a_family_does_not_have_is_found():
    """Plain sliding layers are right only beside full ones that are scaled."""
    config = {**BASES["llama"], **FAMILIES["OLMo 3 scales full attention only"], "rope_theta": 1e4}
    lost = build_model({**config, "rope_scaling": None})
    assert len(attention_differences(attention_settings(config), lost)) == 4


ODD = [None, {}, [], "x", 0, -1, True, {"rope_type": 5}, {"full_attention": {}}, [1, 2]]
SETTINGS = [
    *("rope_theta", "rope_scaling", "rope_parameters", "layer_types", "sliding_window"),
    *("torch_dtype", "text_config", "eos_token_id", "max_position_embeddings"),
]


@pytest.mark.parametrize("key", SETTINGS)
def test_odd_values_end_in_a_right_repo_or_in_one_line(cli, tmp_path, key):
    """Never in a traceback, a repo that stock mlx-lm does not take, or something half-written."""
    source, out = tiny.write_gpt_oss(tmp_path / "src"), tmp_path / "out"
    ends = set()
    for value in ODD:
        (source / "config.json").write_text(json.dumps({**tiny.CONFIG, key: value}))
        done = cli("quantize", source, "-r", "mxfp4-q8", "-o", out, "--force")
        ends.add(done.exit_code)
        if done.exit_code == 0:
            checked = cli("verify", out)
            assert checked.exit_code == 0, (value, checked.output)
        else:
            assert done.exit_code == 2, (value, done.output, done.exception)
            assert done.stderr.count("\n") == 1, done.stderr
            assert not list(tmp_path.glob("out.*"))
    assert ends <= {0, 2}


PLAIN_THETA = {"rope_type": "default", "rope_theta": 500000.0}
LINEAR_THETA = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
# what is written -> what transformers 5 makes of it, in the older form
DECIDED = {
    "rope_scaling replaces rope_parameters": (
        {"rope_theta": 150000.0, "rope_parameters": LINEAR_THETA, "rope_scaling": YARN},
        (150000.0, YARN),
    ),
    "a theta beside decides over another form's": (
        {"rope_theta": 10000.0, "rope_parameters": PLAIN_THETA, "rope_scaling": YARN},
        (10000.0, YARN),
    ),
    "rope_type decides over type": (
        {"rope_theta": 150000.0, "rope_scaling": {**YARN, "type": "default"}},
        (150000.0, YARN),
    ),
    "rope_type decides over type, the other way": (
        {"rope_theta": 150000.0, "rope_scaling": {"rope_type": "default", "type": "yarn"}},
        (150000.0, None),
    ),
    "a theta inside decides over one beside": (
        {"rope_theta": 10000.0, "rope_parameters": {**YARN, "rope_theta": 150000.0}},
        (150000.0, YARN),
    ),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", DECIDED)
def test_settings_that_contradict_each_other(case, base):
    written, (theta, scaling) = DECIDED[case]
    config = {**BASES[base], **written}
    found = with_rope_settings(config)
    older = {**BASES[base], "rope_theta": theta, "rope_scaling": scaling}
    assert rotate_alike(rotations(found), rotations(older))
    assert attention_differences(attention_settings(config), build_model(found)) == []
    wrong = build_model({**BASES[base], "rope_theta": 777.0})
    assert attention_differences(attention_settings(config), wrong)


LONG = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
OWN_WAYS = {
    "Phi 3 with the older name": {
        "model_type": "phi3",
        "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "su", **LONG},
    },
    "Phi 3.5 MoE with factors on long inputs": {
        "model_type": "phimoe",
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "longrope", "short_mscale": 1.2, "long_mscale": 1.2, **LONG},
    },
}


@pytest.mark.parametrize("case", OWN_WAYS)
def test_longrope_of_every_name(case):
    config = {**BASES["llama"], "rope_theta": 10000.0, **OWN_WAYS[case]}
    model = build_model(with_rope_settings(config))
    assert attention_differences(attention_settings(config), model) == []
    config["rope_scaling"] = {**config["rope_scaling"], "long_factor": [3.0] * 16}
    assert attention_differences(attention_settings(config), model)


def test_scaling_without_a_base_is_missed_when_it_is_lost():
    """Gemma 3's published text_config states no base: the family's own is meant."""
    config = {k: v for k, v in GEMMA_LAYERS.items() if k not in ("rope_theta", "layer_types")}
    asked = attention_settings({**config, "rope_scaling": LINEAR})
    lost = build_model({**config, "rope_theta": 1e6, "rope_scaling": None})
    assert attention_differences(asked, lost)


def test_what_one_layer_type_rotates_is_not_spread_to_all():
    settings = by_type({**PLAIN_THETA, "partial_rotary_factor": 0.5})
    del settings["sliding_attention"]["partial_rotary_factor"]
    found = with_rope_settings({**BASES["gpt_oss"], "rope_parameters": settings})
    assert "partial_rotary_factor" not in found


def test_a_base_for_every_layer_is_no_error():
    bases = {"rope_theta": [5e6, 1e4, 1e4, 5e6]}
    assert with_rope_settings({**BASES["gpt_oss"], **bases})["rope_theta"] == bases["rope_theta"]


@pytest.mark.parametrize("theta", ["150000", 10**400, [], [1e4, "x"], float("inf"), 0])
def test_bases_that_are_no_numbers(refused, tmp_path, theta):
    config = {**tiny.CONFIG, "rope_theta": theta}
    message = refused(tiny.write_gpt_oss(tmp_path / "src", config=config))
    assert "config.json: rope_theta is" in message
    assert "not a positive number" in message
