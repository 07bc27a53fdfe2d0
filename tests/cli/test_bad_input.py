"""Bad input of every command: exit status 2 and one line that names the flag, the value and the fix.

All of it is found before weights are read: the models here have none.
"""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from metamorph import cli


TRAIN = "train --tune_mm_mlp_adapter True --bf16 False"
SD = "--pretrained_model_name_or_path tower"
PARTS = "--model_name_or_path llm --vision_tower tower --data_path data.jsonl"
OFFLINE = "is neither a local folder nor in the Hub's cache, and HF_HUB_OFFLINE is set"

GENERATE = "generate --model mini --prompt x"

BAD = [
    # Names of flags, commands and choices.
    ("evaluate world --modle mini", "unknown flag --modle: did you mean --model?"),
    ("visualize --guidance_scal 3", "unknown flag --guidance_scal: did you mean --guidance-scale?"),
    (f"{TRAIN} --learning-rat 1", "unknown flag --learning-rat: did you mean --learning_rate?"),
    ("train-visualizer -lr 1", "unknown flag -lr: did you mean --lr?"),
    ("generate --max_new_token 3", "unknown flag --max_new_token: did you mean --max-new-tokens?"),
    (
        "data chekc data.jsonl",
        "COMMAND 'chekc' is unknown: use one of check, show, cache-features (did you mean 'check'?)",
    ),
    (
        "convert --from orignal --output-dir new",
        "--from 'orignal' is unknown: use one of original (did you mean 'original'?)",
    ),
    (
        f"{TRAIN} {PARTS} --output_dir new --recompute ful",
        "--recompute 'ful' is unknown: use one of none, full, selective (did",
    ),
    (
        "train-visualizer --output_dir new --guidance_scales 3",
        "unknown flag --guidance_scales: did you mean --validation_",
    ),
    ("train-visualizer --output_dir new --mode mpl", "--mode 'mpl' is unknown: use one of mlp"),
    # Prompts.
    ("generate --model mini --prompt ' '", "--prompt is empty"),
    (
        "generate --model mini --prompt '<image> <image>' --image a.png",
        "--prompt, --image and --video do not fit: the prompt has 2 <image> markers, but there are 1 image",
    ),
    (
        f"{GENERATE} --draw --max-new-tokens 17",
        "--max-new-tokens 17 has no room for an image, which takes 18 (16 visual ",
    ),
    # Numbers.
    (f"{GENERATE} --temperature -1", "--temperature -1 must be at least 0"),
    (f"{GENERATE} --temperature nan", "--temperature nan must be a finite number"),
    (f"{GENERATE} --guidance-scale -2", "--guidance-scale -2 must be at least 0"),
    (f"{GENERATE} --guidance-scale inf", "--guidance-scale inf must be a finite number"),
    (f"{GENERATE} --steps 0", "--steps 0 must be at least 1"),
    (f"{GENERATE} --seed -1", "--seed -1 must be at least 0"),
    (f"{GENERATE} --max-new-tokens 0", "--max-new-tokens 0 must be at least 1"),
    ("study joint-vs-generation-only --budgets 8", "--budgets 8: give numbers of drawing records, each at least --gen"),
    ("study data-grid --questions 8 --budgets 0", "8 of --questions and 0 of --budgets are fewer records than --steps"),
    ("study joint-vs-generation-only --questions 8", "unknown flag --questions"),
    ("study joint-vs-generation-only --generation-per-step 0", "--generation-per-step 0 must be at least 1"),
    ("visualize --visualizer mini --image a.png --steps 0", "--steps 0 must be at least 1"),
    ("visualize --visualizer mini --image a.png --guidance_scale 3 -1", "--guidance-scale -1 must be at least 0"),
    (
        "evaluate visualizer --visualizer mini --images folder --guidance-scale -inf",
        "--guidance-scale -inf must be a finite",
    ),
    ("evaluate visualizer --visualizer mini --images folder --batch_size 0", "--batch-size 0 must be at least 1"),
    ("evaluate loss --model mini --data-path data.jsonl --batch-size 2.5", "--batch_size '2.5' is not a whole number"),
    ("evaluate world --seed -1", "--seed -1 must be at least 0"),
    ("quickstart --seed nan", "--seed 'nan' is not a whole number"),
    ("study joint-vs-generation-only --seeds 0", "--seeds 0 must be at least 1"),
    ("lr --batch 8 --base-lr nan", "--base-lr nan must be a finite number"),
    ("data check data.jsonl --limit 0", "--limit 0 must be at least 1"),
    (f"{TRAIN} {PARTS} --output_dir new --weight_decay inf", "--weight_decay inf must be a finite number"),
    (
        f"{TRAIN} {PARTS} --output_dir new --learning_rate nan",
        "--learning_rate 'nan' is neither a finite number nor auto",
    ),
    ("train-visualizer --output-dir new --lr nan", "--lr nan must be a finite number"),
    (f"{GENERATE} --num-images 0 --visualizer mini", "--num-images 0 must be at least 1"),
    (f"{GENERATE} --num-images 2", "--num-images 2 needs --visualizer, which draws the images"),
    (f"{GENERATE} --top-p 0.9", "--top-p 0.9 has no effect without --temperature"),
    (f"{GENERATE} --temperature 1 --top-p 1.5", "--top-p 1.5 must be above 0 and at most 1"),
    (f"{GENERATE} --fps 0", "--fps 0 must be above 0"),
    # Files of prompts.
    ("generate --model mini", "give a --prompt, or a file of prompts as --input"),
    (f"{GENERATE} --batch-size 2", "--batch-size 2 needs --input, a file of prompts"),
    (f"{GENERATE} --input data.jsonl --output r.jsonl", "--prompt and --input data.jsonl: give one of them; the lines"),
    ("generate --model mini --input none.jsonl --output r.jsonl", "--input none.jsonl does not exist"),
    ("generate --model mini --input data.jsonl", "--input data.jsonl needs --output, a file of results that ends in"),
    ("generate --model mini --input data.jsonl --output data.jsonl", "--output data.jsonl is the file of --input"),
    ("generate --model llm --input data.jsonl --output r.jsonl", "--model llm is a plain language model"),
    (
        "generate --model mini --input a.png --output data.jsonl",
        "--output data.jsonl exists, but data/batch.json does ",
    ),
    # What is written.
    (f"{GENERATE} --output a.png", "--output a.png needs --visualizer"),
    (f"{GENERATE} --visualizer mini --output folder", "--output folder is a folder: give a file"),
    (f"{GENERATE} --visualizer mini --output a.pdf", "--output a.pdf is not the name of an image: end it in .png"),
    (f"{GENERATE} --visualizer mini --output file/x.png", "--output file/x.png cannot be written to: file is a file; "),
    (f"{GENERATE} --visualizer mini --output a.png", "--output a.png exists: give another name, or --overwrite"),
    (f"{GENERATE} --output a.safetensors --output-dir new", "--output a.safetensors and --output-dir new: give one of"),
    (f"{GENERATE} --output-dir file", "--output-dir file cannot be written to: file is a file; give a folder"),
    ("chat --model mini --output-dir file", "--output-dir file cannot be written to: file is a file; give a folder"),
    ("visualize --visualizer mini --image a.png --output folder", "--output folder is a folder: give a file"),
    (
        "visualize --visualizer mini --image a.png --output file/x.png",
        "--output file/x.png cannot be written to: file is a",
    ),
    ("evaluate world --output_dir file", "--output-dir file cannot be written to: file is a file; give a folder"),
    ("data show data.jsonl --output-dir file/new", "--output_dir file/new cannot be written to: file is a file"),
    ("convert --merge-adapter llm --output file", "--output-dir file cannot be written to: file is a file"),
    ("quickstart --output-dir file", "--output-dir file cannot be written to: file is a file"),
    ("study joint-vs-generation-only --output-dir file", "--output-dir file cannot be written to: file is a file"),
    (f"{TRAIN} {PARTS} --output_dir file", "--output_dir file cannot be written to: file is a file"),
    (f"train-visualizer {SD} --output-dir file", "--output_dir file cannot be written to: file is a file"),
    # What is read.
    (f"{GENERATE} --image /none.png", "--image /none.png does not exist"),
    (f"{GENERATE} --image folder", "--image folder is a folder: give an image file"),
    (f"{GENERATE} --image file", "--image file cannot be read as an image"),
    (f"{GENERATE} --image https://a.org/b.png", "--image https://a.org/b.png is a URL, and nothing is downloaded"),
    (f"{GENERATE} --visualizer folder", "--visualizer folder is a folder without model_index.json"),
    (f"{GENERATE} --visualizer folder/nowhere/x", "--visualizer folder/nowhere/x does not exist"),
    (f"{GENERATE} --model folder", "--model folder is a folder without config.json"),
    (f"{GENERATE} --model folder/nowhere/x", "--model folder/nowhere/x does not exist"),
    (f"{GENERATE} --model nowhere/x", f"--model nowhere/x {OFFLINE}"),
    (f"{GENERATE} --video none.mp4", "--video none.mp4 does not exist"),
    (f"{GENERATE} --video a.png", "--video a.png cannot be read as a video"),
    (
        f"{GENERATE} --video a.png --prompt '<video> <video>'",
        "--prompt, --image and --video do not fit: the prompt has 2 <video> markers",
    ),
    ("chat --model folder", "--model folder is a folder without config.json"),
    ("visualize --visualizer mini --tokens a.png", "a.png is not a safetensors file"),
    ("visualize --visualizer mini --tokens a.png --image a.png", "--image not allowed with argument --tokens"),
    ("evaluate world --model folder", "--model folder is a folder without config.json"),
    ("evaluate world --visualizer folder/nowhere/x", "--visualizer folder/nowhere/x does not exist"),
    ("visualize --visualizer mini --image folder", "--image folder is a folder: give an image file"),
    ("visualize --visualizer llm --image a.png", "--visualizer llm is a folder without model_index.json"),
    ("evaluate world --model nosuch", f"--model nosuch {OFFLINE}"),
    ("evaluate world --visualizer nosuch", f"--visualizer nosuch {OFFLINE}"),
    (
        "evaluate world --model llm",
        "--model llm is a plain language model (LlamaForCausalLM), not a MetaMorph model: give the",
    ),
    (
        "evaluate loss --model tower --data_path data.jsonl",
        "--model tower is a vision tower (SiglipVisionModel), not a Meta",
    ),
    ("evaluate loss --model stage1 --data_path data.jsonl", "--model stage1 has no model weights"),
    (
        "data check data.jsonl --model-name-or-path tower",
        "--model_name_or_path tower is a vision tower (SiglipVisionModel)",
    ),
    (
        f"{TRAIN} --model_name_or_path tower --data_path data.jsonl --output_dir new",
        "--model_name_or_path tower is a vision",
    ),
    (
        f"{TRAIN} --model_name_or_path no/model --data_path data.jsonl --output_dir new",
        f"--model_name_or_path no/model {OFFLINE}",
    ),
    (
        "convert --from original --model stage1 --vision-tower no/tower --output-dir new",
        f"--vision-tower no/tower {OFFLINE}",
    ),
    ("visualize --visualizer mini --image a.png --vision_tower no/tower", f"--vision-tower no/tower {OFFLINE}"),
    (
        "train-visualizer --output-dir new --vision-tower tower --pretrained-model-name-or-path no/sd",
        f"--pretrained_model_name_or_path no/sd {OFFLINE}",
    ),
]


@pytest.fixture
def folder(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a file, an empty folder, an image, records, and models without weights."""
    for name in ("llm", "tower"):
        shutil.copytree(parts / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "config.json").write_text(json.dumps({"model_type": "metamorph"}))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    shutil.copy(parts / "data.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("words", "message"), BAD, ids=[words for words, _ in BAD])
def test_bad_input_is_one_line(
    words: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = sorted(folder.iterdir())
    command = words.split()[0]
    assert cli.main(shlex.split(words)) == 2
    printed = capsys.readouterr()
    (line,) = (line for line in printed.err.splitlines() if not line.startswith("[transformers]"))
    assert line.startswith(f"metamorph {command}: error: {message}")
    assert "--debug" not in line
    assert printed.out == ""
    assert sorted(folder.iterdir()) == before  # nothing was written
