"""Every number of the 20 released scripts (tests/data/published_scripts.json) is that of its recipe: said
there, or the default of the command, which is that of the published program."""

import json
from pathlib import Path

import pytest

from vmae.cli import build_parser
from vmae.config import MODEL, ModelConfig
from vmae.data.manifest import DEFAULT_PATTERN
from vmae.evaluate.classify import published_views
from vmae.train import finetune_settings, pretrain_settings

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
SCRIPTS = json.loads((ROOT / "tests" / "data" / "published_scripts.json").read_text())
RECIPE_OF = {
    "vit_b_hybrid_pt": "pretrain_vitb",
    "vit_l_hybrid_pt": "pretrain_vitl",
    "vit_h_hybrid_pt": "pretrain_vith",
    "vit_g_hybrid_pt": "pretrain_vitg",
    "vit_b_k710_ft": "postpretrain_vitb_k710",
    "vit_h_k710_ft": "postpretrain_vith_k710",
    "vit_g_k710_ft": "postpretrain_vitg_k710",
    "vit_b_k400_ft": "finetune_vitb_k400",
    "vit_b_ssv2_ft": "finetune_vitb_ssv2",
    "vit_l_k400_ft": "finetune_vitl_k400",
    "vit_l_ssv2_ft": "finetune_vitl_ssv2",
    "vit_h_k400_ft": "finetune_vith_k400",
    "vit_h_k600_ft": "finetune_vith_k600",
    "vit_h_ssv2_ft": "finetune_vith_ssv2",
    "vit_g_k400_ft": "finetune_vitg_k400",
    "vit_g_ssv2_ft": "finetune_vitg_ssv2",
    "vit_g_k710_it_k400_ft": "finetune_vitg_k400_after_k710",
    "vit_g_k710_it_k600_ft": "finetune_vitg_k600",
    "vit_g_k710_it_hmdb51_ft": "finetune_vitg_hmdb51",
    "vit_g_k710_it_ucf101_ft": "finetune_vitg_ucf101",
}
# Defaults of the two programs, where a script is silent.
BOTH = {"input_size": 224, "num_frames": 16, "sampling_rate": 4, "clip_grad": None, "weight_decay": 0.05}
PRETRAIN = BOTH | {"drop_path": 0, "min_lr": 1e-5, "num_sample": 1, "tubelet_size": 2}
PRETRAIN |= {"normlize_target": True, "num_workers": 10}
FINETUNE = BOTH | {
    "short_side_size": 224,
    "drop_path": 0.1,
    "min_lr": 1e-6,
    "num_sample": 2,
    "head_drop_rate": 0,
}
FINETUNE |= {"layer_decay": 0.75, "warmup_epochs": 5, "nb_classes": 400, "data_set": "Kinetics-400"}
FINETUNE |= {"smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "reprob": 0.25, "init_scale": 0.001}
# What a recipe does not hold: paths, and what changes no weight.
LEFT_OUT = {
    *("data_path", "finetune", "log_dir", "output_dir"),
    *("save_ckpt_freq", "dist_eval", "enable_deepspeed", "with_checkpoint"),
    "warmup_lr",  # neither program reads it
}
# Of the lists: 16 frames over the whole video, no mirrored clips.
SPARSE = {"SSV2"}
CLASSES = {
    "Kinetics-400": 400,
    "Kinetics-600": 600,
    "Kinetics-710": 710,
    "SSV2": 174,
    "UCF101": 101,
    "HMDB51": 51,
}


def wanted(name):
    """Settings of a script by published name: numbers as numbers, those of the program where it is silent."""

    def number(word):
        words = [] if word is True else word.split()
        try:
            found = [float(part) for part in words]
        except ValueError:
            return word
        return tuple(found) if len(found) > 1 else found[0] if found else True

    script = SCRIPTS[name]
    start = PRETRAIN if script["program"] == "run_mae_pretraining.py" else FINETUNE
    own = {flag: number(word) for flag, word in script["flags"].items() if flag not in LEFT_OUT}
    return start | own, int(script["gpus"])


def settings_of(name, gpus, monkeypatch):
    """The settings that a recipe's file resolves to, started on so many GPUs without its launcher."""
    monkeypatch.setenv("WORLD_SIZE", str(gpus))
    command = "pretrain" if name.startswith("pretrain") else "finetune"
    words = [
        command,
        "--config",
        str(RECIPES / f"{name}.yaml"),
        "--data",
        "x",
        "--output",
        "y",
        "--init",
        "z",
    ]
    args = build_parser(command).parse_args(words)
    if command == "pretrain":
        return pretrain_settings.configs_from_args(args)
    args.settings.complete(args)
    model = finetune_settings.model_from_args(args)
    return finetune_settings.configs_from_args(args, model, args.num_classes)


def common(config, run, model):
    optim = config.optim
    return {
        "model": model,
        "epochs": config.epochs,
        "batch_size": run.batch_size,
        "num_sample": config.num_sample,
        "num_workers": run.speed.num_workers,
        "num_frames": model.num_frames,
        "input_size": model.img_size,
        "tubelet_size": model.tubelet_size,
        "drop_path": model.drop_path_rate,
        "lr": optim.lr,
        "min_lr": optim.min_lr,
        "warmup_epochs": optim.warmup_epochs,
        "weight_decay": optim.weight_decay,
        "clip_grad": optim.clip_grad,
        "opt_betas": optim.betas,
        "opt": "adamw",
    }


def found_of_pretraining(config, run):
    return common(config, run, config.model) | {
        "sampling_rate": config.stride,
        "mask_type": config.mask.encoder,
        "mask_ratio": config.mask.encoder_ratio,
        "decoder_mask_type": {"running_cell": "run_cell"}.get(config.mask.decoder),
        "decoder_mask_ratio": config.mask.decoder_ratio,
        "decoder_depth": config.model.decoder_depth,
        "normlize_target": config.normalize_target,
    }


def found_of_finetuning(config, run):
    views = published_views(config.clip.sampling)  # which the launcher passes to `evaluate`
    return common(config, run, config.model) | {
        "sampling_rate": config.clip.stride,
        "short_side_size": config.clip.short_side or config.clip.image_size,
        "test_num_segment": views.segments,
        "test_num_crop": views.crops,
        "nb_classes": config.num_classes,
        "layer_decay": config.layer_decay,
        "head_drop_rate": config.head_drop_rate,
        "smoothing": config.augment.smoothing,
        "mixup": config.augment.mixup,
        "cutmix": config.augment.cutmix,
        "reprob": config.augment.erase,
        "init_scale": config.init_scale,
        "fname_tmpl": DEFAULT_PATTERN,
        "start_idx": 1,  # a list says where its images start
    }


@pytest.mark.parametrize("name", RECIPE_OF)
def test_every_number_is_that_of_the_script(name, monkeypatch):
    expected, gpus = wanted(name)
    config, run = settings_of(RECIPE_OF[name], gpus, monkeypatch)
    read = found_of_pretraining if RECIPE_OF[name].startswith("pretrain") else found_of_finetuning
    found = read(config, run)
    preset = ModelConfig.preset(MODEL.read(expected.pop("model")))
    model = found.pop("model")
    assert (model.embed_dim, model.depth, model.num_heads, model.patch_size) == (
        preset.embed_dim,
        preset.depth,
        preset.num_heads,
        preset.patch_size,
    )
    if read is found_of_finetuning:
        data = expected.pop("data_set")
        assert CLASSES[data] == expected["nb_classes"]
        assert (config.clip.sampling == "sparse", not config.augment.flip) == (data in SPARSE, data in SPARSE)
        assert config.clip.resize == "published"
    assert {flag: found[flag] for flag in expected} == expected
    assert config.effective_batch == expected["batch_size"] * gpus
    assert (config.steps, run.accumulate) == (None, 1)


def test_every_script_has_a_recipe_and_every_recipe_a_script():
    assert set(RECIPE_OF) == set(SCRIPTS) and len(set(RECIPE_OF.values())) == 20
    found = {
        path.stem
        for pattern in ("pretrain_vit*", "postpretrain_*", "finetune_*")
        for path in RECIPES.glob(f"{pattern}.yaml")
    }
    assert found == set(RECIPE_OF.values())
    for name, recipe in RECIPE_OF.items():
        text = (RECIPES / f"{recipe}.yaml").read_text()
        assert f"released script {name}.sh ({SCRIPTS[name]['gpus']} GPU" in text
        assert (RECIPES / f"{recipe}.sh").stat().st_mode & 0o111 and f" {recipe} " in (
            RECIPES / f"{recipe}.sh"
        ).read_text()


# Scores of the released models: top-1, top-5; 5 x 3 views, SSv2 2 x 3.
SCORES = {
    "postpretrain_vitg_k710": ("83.8", "96.4"),
    "finetune_vitg_k400": ("87.2", "97.4"),
    "finetune_vitg_k400_after_k710": ("88.4", "98.0"),
    "finetune_vitg_k600": ("88.8", "98.2"),
    "finetune_vitg_ssv2": ("77.0", "95.9"),
    "finetune_vitg_ucf101": ("99.6", "100.0"),
    "finetune_vitg_hmdb51": ("88.1", "98.5"),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_stand_beside_the_numbers(name):
    score = "top-1 {}, top-5 {}".format(*SCORES[name])
    views = "2 x 3" if "ssv2" in name else "5 x 3"
    assert (
        f"# Published, not verified: {score}, on {views} views.\n" in (RECIPES / f"{name}.yaml").read_text()
    )
    assert f'PUBLISHED="{score}"\n' in (RECIPES / f"{name}.sh").read_text()


@pytest.mark.parametrize(
    "size, scores", [("s", "77.6 83.7 83.1 84.0 84.6"), ("b", "81.5 86.6 85.9 87.1 87.4")]
)
def test_scores_of_distilled_students(size, scores):
    k710, k400, k600, further_k400, further_k600 = scores.split()
    start = f"top-1 {k710} on K710, {k400} on K400, {k600} on K600"
    for ending in ("yaml", "sh"):
        text = " ".join(
            (RECIPES / f"distill_vitg_to_vit{size}.{ending}").read_text().replace("# ", "").split()
        )
        assert start in text and f"{further_k400} on K400" in text and f"{further_k600} on K600" in text
        assert "7 x 3 views" in text
