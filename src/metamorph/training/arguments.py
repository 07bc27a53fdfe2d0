"""The flags of `metamorph train`: the names and defaults of the training guide, checked before anything is loaded."""

import json
import logging
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments

from metamorph.data.mixture import read_specs
from metamorph.data.packing import check_grouping
from metamorph.data.records import ON_BAD_RECORD
from metamorph.flags import RemembersGiven, check_choice, check_model_reference
from metamorph.models.configuration_metamorph import check_options
from metamorph.models.constants import ASPECT_RATIOS


logger = logging.getLogger(__name__)

LOSS_NORMALIZATIONS = ("global", "micro_batch")
SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length")


@dataclass
class ModelArguments(RemembersGiven):
    """What the network is and which part of it is trained.

    When a finished MetaMorph model is trained further, flags that are not given are as in that model. A value of
    None means the stage's own default.
    """

    model_name_or_path: str
    """Base language model, or a finished MetaMorph model: a local folder or a Hub id."""
    version: str = "llama3"
    """Conversation template: llama3, llama3_original, chatml, plain, or auto, which takes the tokenizer's own."""
    vision_tower: str = "siglip/CLIP-ViT-SO400M-14-384"
    """SigLIP, SigLIP 2, CLIP or DINOv2 vision model: a folder or Hub id. The default is SigLIP-SO400M/14 at 384 px."""
    mm_vision_select_layer: int = -1
    """Which hidden state of the tower becomes visual tokens; -1 is the last layer's, before the final norm."""
    freeze_vision: bool = True
    """Whether the vision tower stays bit-identical."""
    normalize_vision: bool = True
    """Whether visual tokens, and predictions of them, have length 1."""
    image_token_reduction: str = "interpolation"
    """How patches become `num_image_tokens` tokens: interpolation, concat_interpolation, mlpmixer or none."""
    num_image_tokens: int = 64
    """Visual tokens per image; a square number for the interpolations."""
    mm_use_im_start_end: bool = True
    """Whether the tokens `<image_start>` and `<image_end>` stand around every image."""
    mm_use_im_patch_token: bool = False
    """Whether the placeholder token is `<im_patch>`."""
    mm_projector_type: str = "mlp2x_gelu"
    """Connector from visual tokens to the language model: linear, mlp{N}x_gelu, mlpsoftmax or identity."""
    tune_mm_mlp_adapter: bool = False
    """True is stage 1 (pretraining), False is stage 2 (fine-tuning)."""
    pretrain_mm_mlp_adapter: str | None = None
    """The connector that stage 2 starts from: stage 1's output folder, or an mm_projector.safetensors or .bin."""
    from_scratch_connector: bool = False
    """Must be set to run stage 2 on a plain language model without a connector."""
    freeze_backbone: bool = False
    """Whether the language model, its embeddings and `lm_head` stay bit-identical in stage 2."""
    freeze_mm_mlp_adapter: bool = False
    """Whether the connector stays bit-identical in stage 2."""
    use_vision_ar: bool | None = None
    """Whether the visual loss is trained; by default not in stage 1 and yes in stage 2."""
    vision_head_type: str = "mlp"
    """Head from the language model to visual tokens: linear, mlp or mlp2x_gelu."""
    vision_coef: float | None = None
    """Weight of the visual loss; 1.0 when not given."""
    apply_softmax: bool = False
    """Whether visual tokens are distributions over features, softmax(x / 0.07): so the connector reads them, and so
    the vision head is trained to predict them, with cross-entropy."""
    attn_implementation: str | None = None
    """Attention of the language model, such as sdpa or flash_attention_2; by default Transformers chooses."""

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_stage()
        self.model_name_or_path = os.path.expanduser(self.model_name_or_path)
        self.vision_tower = os.path.expanduser(self.vision_tower)
        check_model_reference(self.model_name_or_path, flag="--model_name_or_path")
        if not self.continues_metamorph or self.is_given("vision_tower"):
            check_model_reference(self.vision_tower, flag="--vision_tower")
        if self.pretrain_mm_mlp_adapter is not None:
            self.pretrain_mm_mlp_adapter = os.path.expanduser(self.pretrain_mm_mlp_adapter)
        if self.pretrain_mm_mlp_adapter is not None and not Path(self.pretrain_mm_mlp_adapter).exists():
            raise FileNotFoundError(
                f"--pretrain_mm_mlp_adapter {self.pretrain_mm_mlp_adapter} does not exist: give the output folder of "
                "stage 1, or the mm_projector.safetensors in it"
            )
        if Path(self.model_name_or_path).is_dir():  # of a Hub id the type is not known yet
            self._check_is_whole()
            self.require_connector(self.continues_metamorph)

    @property
    def continues_metamorph(self) -> bool:
        """Whether `model_name_or_path` is a local folder with a finished MetaMorph model."""
        return local_model_type(self.model_name_or_path) == "metamorph"

    @property
    def stage(self) -> int:
        """1 while only the connector is trained, else 2."""
        return 1 if self.tune_mm_mlp_adapter else 2

    @property
    def resolved_use_vision_ar(self) -> bool:
        """`use_vision_ar` as asked for, else the stage's default."""
        return not self.tune_mm_mlp_adapter if self.use_vision_ar is None else self.use_vision_ar

    def require_connector(self, continues_metamorph: bool) -> None:
        """Refuse stage 2 on a plain language model without a trained connector.

        Args:
            continues_metamorph: Whether the model is a finished MetaMorph model, which has its connector.
        """
        has_connector = continues_metamorph or self.pretrain_mm_mlp_adapter is not None
        if self.tune_mm_mlp_adapter or has_connector or self.from_scratch_connector:
            return
        raise ValueError(
            f"stage 2 (--tune_mm_mlp_adapter False) has no connector: {self.model_name_or_path} is a plain language "
            "model and --pretrain_mm_mlp_adapter is not set. Run stage 1 (--tune_mm_mlp_adapter True) and pass its "
            "output folder as --pretrain_mm_mlp_adapter, or allow a random one by --from_scratch_connector True"
        )

    def _check_is_whole(self) -> None:
        folder = Path(self.model_name_or_path)
        if self.continues_metamorph and not any(folder.glob("model*.safetensors*")):
            raise FileNotFoundError(
                f"--model_name_or_path {self.model_name_or_path} has no model weights. If it is the output of stage 1, "
                "pass it as --pretrain_mm_mlp_adapter, and the language model as --model_name_or_path"
            )

    def _check_choices(self) -> None:
        try:
            check_options(self)
        except ValueError as error:
            raise ValueError(f"--{error}") from error

    def _check_stage(self) -> None:
        if self.tune_mm_mlp_adapter and not self.freeze_vision:
            raise ValueError(
                "--tune_mm_mlp_adapter True trains the connector only, but --freeze_vision False asks to train the "
                "tower: tune the tower in stage 2 (--tune_mm_mlp_adapter False)"
            )
        if self.tune_mm_mlp_adapter and self.freeze_mm_mlp_adapter:
            raise ValueError(
                "--tune_mm_mlp_adapter True and --freeze_mm_mlp_adapter True leave nothing to train: drop one of them"
            )


@dataclass
class DataArguments(RemembersGiven):
    """What the model learns from."""

    data_path: str
    """Records: a JSON array, JSON Lines, tars in WebDataset's layout (`shard-{000..099}.tar`), or a mixture of
    sources (YAML)."""
    image_folder: str | None = None
    """Folder that relative paths of images and videos start at; by default the folder of the records. Tars bring
    their media, and sources of a mixture may name a folder of their own."""
    model_max_length: int = 4096
    """Longest sequence in tokens, visual tokens included."""
    image_aspect_ratio: str = "square"
    """`square` lets the image processor resize to a square, `pad` keeps the proportions by a border. When a finished
    model is trained further and this is not given, as in that model."""
    on_bad_record: str = "raise"
    """What happens with a record that cannot be used: raise, or skip (count, log and leave out)."""
    max_bad_fraction: float = 0.01
    """Largest share of skipped records, between 0 and 1; above it the run stops."""
    feature_cache: str | None = None
    """Folder with visual tokens made by `metamorph data cache-features`: they stand in for the images, and the tower,
    which must be frozen, is not run."""

    def __post_init__(self) -> None:
        check_choice("--image_aspect_ratio", self.image_aspect_ratio, ASPECT_RATIOS)
        check_choice("--on_bad_record", self.on_bad_record, ON_BAD_RECORD)
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max_bad_fraction {self.max_bad_fraction} must lie between 0 and 1")
        if self.model_max_length < 2:
            raise ValueError(f"--model_max_length {self.model_max_length} must be at least 2 tokens")
        self.data_path = os.path.expanduser(self.data_path)
        read_specs(self.data_path)
        if self.image_folder is not None:
            self.image_folder = os.path.expanduser(self.image_folder)
        if self.feature_cache is not None:
            self.feature_cache = os.path.expanduser(self.feature_cache)
        if self.image_folder is not None and not Path(self.image_folder).is_dir():
            raise FileNotFoundError(f"--image_folder {self.image_folder} does not exist or is not a folder")


@dataclass
class MetaMorphTrainingArguments(TrainingArguments):
    """How it learns: every flag of `transformers.TrainingArguments`, with the guide's defaults, and our own.

    Weights are kept in float32; `bf16` and `fp16` choose the precision of the computation (autocast). Without a
    GPU the run falls back to the CPU.
    """

    weight_decay: float = 0.0
    """Weight decay of AdamW; norms and biases have none."""
    lr_scheduler_type: str = "cosine"
    """Shape of the learning rate over the run."""
    warmup_ratio: float = 0.03
    """Share of the optimizer steps used for warm-up, in [0, 1). Ignored when `warmup_steps` is given."""
    warmup_steps: float = 0
    """Optimizer steps of warm-up (below 1: their share); 0 leaves it to `warmup_ratio`."""
    evaluation_strategy: str | None = None
    """Spelling of `eval_strategy` in Transformers 4, still understood."""
    bf16: bool = True
    """Compute in bfloat16, with float32 weights."""
    fp16: bool = False
    """Compute in float16, with float32 weights; needs `bf16=False`."""
    loss_normalization: str = "global"
    """`global` divides each loss by its tokens over all micro-batches and ranks of the optimizer step;
    `micro_batch` averages every micro-batch by itself, as the original system did."""
    packing: bool = True
    """Whether several samples share a row of `model_max_length` tokens, without seeing each other. Batches are then
    counted in rows: see `per_device_train_batch_size`. False pads every sample to the longest of its batch."""
    per_device_train_batch_size: int = 8
    """Rows per process and micro-batch. With `packing` a row holds as many samples as fit into `model_max_length`
    tokens, without it one sample."""
    train_sampling_strategy: str = "random"
    """Order of the samples: random, sequential, or (only with `packing=False`) group_by_length, which puts samples of
    similar length into one step."""
    group_by_length: bool = False
    """Spelling of `train_sampling_strategy="group_by_length"` in Transformers 4, still understood."""
    mm_projector_lr: float | None = None
    """Learning rate of the connector and of the new tokens' rows in stage 1; by default `learning_rate`."""
    vision_lr: float | None = None
    """Learning rate of the vision tower (with `freeze_vision=False`); by default `learning_rate`."""
    vision_head_lr: float | None = None
    """Learning rate of the vision head; by default `learning_rate`."""
    logging_steps: float = 10
    """Optimizer steps between two log lines."""
    logging_nan_inf_filter: bool = False
    """Off: the filter reads the loss back from the device at every step, and it hides what should be seen."""
    remove_unused_columns: bool = False
    """Our dataset yields exactly what the collator needs."""
    prediction_loss_only: bool = True
    """Evaluation returns losses only."""
    label_names: list[str] | None = None
    """Inputs that are labels; by default `labels`."""
    disable_tqdm: bool | None = None
    """Log lines instead of a progress bar; by default when there is no terminal."""
    ddp_find_unused_parameters: bool | None = False
    """Off: text-only batches keep the connector and the vision head in the graph."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder. By default the newest complete one in `output_dir`, if any; True: there must be one;
    False: start anew."""

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ValueError("--output_dir is required: the folder for checkpoints and the trained model")
        check_choice("--loss_normalization", self.loss_normalization, LOSS_NORMALIZATIONS)
        self._check_batches()
        if self.bf16 and self.fp16:
            raise ValueError("--fp16 True and --bf16 True exclude each other: add --bf16 False")
        for name in ("learning_rate", "mm_projector_lr", "vision_lr", "vision_head_lr"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"--{name} {value} must be a finite number, 0 or larger")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"--warmup_ratio {self.warmup_ratio} must lie in [0, 1)")
        if not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio  # Transformers 5 reads a value below 1 as a ratio
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        if self.label_names is None:
            self.label_names = ["labels"]
        super().__post_init__()
        if self.n_gpu > 1:
            logger.warning("using 1 of %d GPUs: start with torchrun to use them all", self.n_gpu)
            self._n_gpu = 1  # nn.DataParallel would split pixel_values as if every sample had one image

    def _check_batches(self) -> None:
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"
        check_choice("--train_sampling_strategy", self.train_sampling_strategy, SAMPLING_STRATEGIES)
        check_grouping(self.packing, self.train_sampling_strategy == "group_by_length")
        if self.per_device_train_batch_size < 1:
            raise ValueError(f"--per_device_train_batch_size {self.per_device_train_batch_size} must be at least 1")
        if self.dataloader_drop_last:
            raise ValueError(
                "--dataloader_drop_last True cannot be had: every sample is trained on exactly once in each epoch, and "
                "a last step with fewer samples weighs each of them as all others do; drop the flag"
            )


def local_model_type(name: str) -> str | None:
    """The `model_type` that the config.json of a local folder names, or None for anything else."""
    config = Path(name) / "config.json"
    if not config.is_file():
        return None
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except json.JSONDecodeError as error:
        raise ValueError(f"{config} is not valid JSON ({error}): the model folder is damaged") from error
