"""The flags of `metamorph train` that define the network and which parts of it are trained."""

import os
from dataclasses import InitVar, dataclass, field
from pathlib import Path

from metamorph.files.model_files import read_json_object
from metamorph.flags.checks import RemembersGiven, check_model_reference
from metamorph.mini import shipped_folder
from metamorph.models.adapters import is_adapter_folder
from metamorph.models.configuration_metamorph import TOKEN_REDUCTIONS, VISION_HEAD_TYPES, check_options
from metamorph.models.sequence.constants import VERSIONS
from metamorph.runs.checkpoint_files import check_is_plain


@dataclass
class ModelArguments(RemembersGiven):
    """The network, and which parts of it are trained.

    When a MetaMorph model is trained further, flags that are not given keep that model's values. None selects the
    default of the stage. A dry run needs neither weights nor a connector.
    """

    model_name_or_path: str
    """Base language model, or a MetaMorph model to train further: a local folder or a Hub id; mini-llama and mini ship
    with the package."""
    version: str = field(default="llama3", metadata={"choices": VERSIONS})
    """Conversation template: llama3, llama3_original, chatml, plain, or auto, which uses the tokenizer's template."""
    vision_tower: str = "siglip/CLIP-ViT-SO400M-14-384"
    """SigLIP, SigLIP 2, CLIP or DINOv2 vision model: a folder or Hub id, or mini-siglip, which ships with the package.
    The default is an alias of google/siglip-so400m-patch14-384."""
    mm_vision_select_layer: int = -1
    """Hidden state of the tower that becomes visual tokens; -1 is that of the last layer, before the final norm."""
    freeze_vision: bool = True
    """Freeze the vision tower."""
    normalize_vision: bool = True
    """Normalise visual tokens and their predictions to length 1."""
    image_token_reduction: str = field(default="interpolation", metadata={"choices": TOKEN_REDUCTIONS})
    """How patches are reduced to `num_image_tokens` tokens: interpolation, concat_interpolation, mlpmixer or none."""
    num_image_tokens: int = 64
    """Visual tokens per image; a square number for the interpolations."""
    mm_use_im_start_end: bool = True
    """Enclose every image in the tokens `<image_start>` and `<image_end>`."""
    mm_use_im_patch_token: bool = False
    """Use the placeholder token `<im_patch>` instead of `<image>`."""
    mm_projector_type: str = "mlp2x_gelu"
    """Connector from visual tokens to the language model: linear, mlp{N}x_gelu, mlpsoftmax or identity."""
    tune_mm_mlp_adapter: bool = False
    """True is stage 1 (pretraining), False is stage 2 (fine-tuning)."""
    pretrain_mm_mlp_adapter: str | None = None
    """Connector that stage 2 starts from: the output folder of stage 1, or an mm_projector.safetensors or .bin."""
    from_scratch_connector: bool = False
    """Must be set to run stage 2 on a plain language model without a trained connector."""
    freeze_backbone: bool = False
    """Freeze the language model, its embeddings and `lm_head` in stage 2."""
    freeze_mm_mlp_adapter: bool = False
    """Freeze the connector in stage 2."""
    use_vision_ar: bool | None = None
    """Train with the visual loss; by default in stage 2 only."""
    vision_head_type: str = field(default="mlp", metadata={"choices": VISION_HEAD_TYPES})
    """Head from the language model to visual tokens: linear, mlp or mlp2x_gelu."""
    vision_coef: float | None = None
    """Weight of the visual loss; defaults to 1.0."""
    apply_softmax: bool = False
    """Turn visual tokens into distributions over features, softmax(x / 0.07). The connector reads them as such, and the
    vision head is trained to predict them, with cross-entropy."""
    lora_enable: bool = False
    """Train low-rank matrices (LoRA) next to the linear layers of the language model instead of the layers themselves,
    in stage 2. Connector, vision head and the rows of the new tokens are trained in full and saved with them."""
    lora_r: int = 64
    """Rank of the LoRA matrices."""
    lora_alpha: int = 16
    """LoRA's contribution is multiplied by `lora_alpha / lora_r`."""
    lora_dropout: float = 0.05
    """Dropout probability of LoRA's inputs, in [0, 1)."""
    lora_target_modules: list[str] | None = None
    """Names of the linear layers that get LoRA, such as q_proj v_proj; by default all of the language model."""
    bits: int = field(default=16, metadata={"choices": (4, 16)})
    """4 loads the frozen language model in 4 bits with bitsandbytes (in stage 1, or with `lora_enable`: QLoRA)."""
    double_quant: bool = True
    """Quantise the scales of 4-bit weights, too."""
    quant_type: str = field(default="nf4", metadata={"choices": ("nf4", "fp4")})
    """Data type of 4-bit weights: nf4 or fp4."""
    model_license: str | None = None
    """Licence for the model card of the result; the card says unknown without it."""
    attn_implementation: str | None = None
    """Attention of the language model, such as sdpa. By default flash_attention_2 on a GPU where it is installed and
    the run computes in half precision, otherwise Transformers' choice, with flex attention for packed rows on a GPU."""

    dry_run: InitVar[bool] = False  # a flag of DryRunArguments

    def __post_init__(self, dry_run: bool) -> None:
        self._is_dry_run = dry_run
        self.check_values()
        try:
            check_options(self)
        except ValueError as error:
            raise ValueError(f"--{error}") from error
        self._check_stage()
        self._check_lora()
        self.model_name_or_path = shipped_folder(os.path.expanduser(self.model_name_or_path), "model")
        self.vision_tower = shipped_folder(os.path.expanduser(self.vision_tower), "tower")
        check_model_reference(self.model_name_or_path, flag="--model_name_or_path")
        if not self.continues_metamorph or self.is_given("vision_tower"):
            check_model_reference(self.vision_tower, flag="--vision_tower")
        self.missing_connector: str | None = None
        if self.pretrain_mm_mlp_adapter is not None:
            self.pretrain_mm_mlp_adapter = os.path.expanduser(self.pretrain_mm_mlp_adapter)
            if not Path(self.pretrain_mm_mlp_adapter).exists():
                if not dry_run:
                    raise FileNotFoundError(
                        f"--pretrain_mm_mlp_adapter {self.pretrain_mm_mlp_adapter} does not exist: give the output "
                        "folder of stage 1, or the mm_projector.safetensors in it"
                    )
                self.missing_connector, self.pretrain_mm_mlp_adapter = self.pretrain_mm_mlp_adapter, None
        if Path(self.model_name_or_path).is_dir() and not dry_run:  # the type of a Hub model is not known yet
            self._check_weights()
            self.require_connector(self.continues_metamorph)

    @property
    def continues_metamorph(self) -> bool:
        """Whether `model_name_or_path` is a local folder with a MetaMorph model."""
        return local_model_type(self.model_name_or_path) == "metamorph"

    @property
    def stage(self) -> int:
        """1 or 2."""
        return 1 if self.tune_mm_mlp_adapter else 2

    @property
    def resolved_use_vision_ar(self) -> bool:
        """`use_vision_ar`, or the default of the stage if it is not given."""
        return not self.tune_mm_mlp_adapter if self.use_vision_ar is None else self.use_vision_ar

    def require_connector(self, continues_metamorph: bool) -> None:
        """Refuse stage 2 on a plain language model without a trained connector, unless this is a dry run."""
        has_connector = continues_metamorph or self.pretrain_mm_mlp_adapter is not None
        if self.tune_mm_mlp_adapter or has_connector or self.from_scratch_connector or self._is_dry_run:
            return
        raise ValueError(
            f"stage 2 (--tune_mm_mlp_adapter False) has no connector: {self.model_name_or_path} is a plain language "
            "model and --pretrain_mm_mlp_adapter is not set. Run stage 1 (--tune_mm_mlp_adapter True) and pass its "
            "output folder as --pretrain_mm_mlp_adapter, or use a random one with --from_scratch_connector True"
        )

    def _check_weights(self) -> None:
        folder = Path(self.model_name_or_path)
        if is_adapter_folder(folder):
            raise ValueError(
                f"--model_name_or_path {self.model_name_or_path} is a LoRA adapter, which cannot be trained further "
                "on its own: merge it first "
                f"(metamorph convert --merge-adapter {self.model_name_or_path} --output-dir FOLDER)"
            )
        check_is_plain(folder)
        if self.continues_metamorph and not any(folder.glob("model*.safetensors*")):
            raise FileNotFoundError(
                f"--model_name_or_path {self.model_name_or_path} has no model weights. If it is the output of stage 1, "
                "pass it as --pretrain_mm_mlp_adapter, and the language model as --model_name_or_path"
            )

    def _check_stage(self) -> None:
        if self.tune_mm_mlp_adapter and not self.freeze_vision:
            raise ValueError(
                "--tune_mm_mlp_adapter True trains the connector only, but --freeze_vision False asks to train the "
                "tower: train the tower in stage 2 (--tune_mm_mlp_adapter False)"
            )
        if self.tune_mm_mlp_adapter and self.freeze_mm_mlp_adapter:
            raise ValueError(
                "--tune_mm_mlp_adapter True and --freeze_mm_mlp_adapter True leave nothing to train: drop one of them"
            )

    def _check_lora(self) -> None:
        if self.lora_r < 1 or self.lora_alpha < 1:
            raise ValueError(f"--lora_r {self.lora_r} and --lora_alpha {self.lora_alpha} must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout {self.lora_dropout} must lie in [0, 1)")
        if self.bits == 4 and not (self.lora_enable or self.tune_mm_mlp_adapter):
            raise ValueError(
                "--bits 4 keeps the language model frozen, but stage 2 would train it: add --lora_enable True (QLoRA)"
            )
        if not self.lora_enable:
            return
        if self.tune_mm_mlp_adapter:
            raise ValueError(
                "--lora_enable True is for stage 2, and --tune_mm_mlp_adapter True is stage 1, which does not train "
                "the language model: drop one of them"
            )
        if self.freeze_backbone:
            raise ValueError(
                "--lora_enable True trains the language model, and --freeze_backbone True freezes it: drop one of them"
            )
        if not self.freeze_vision:
            raise ValueError(
                "--lora_enable True saves an adapter, which cannot hold a trained vision tower: drop "
                "--freeze_vision False, or train without LoRA"
            )


def local_model_type(name: str) -> str | None:
    """The `model_type` in the config.json of a local folder; None for anything else."""
    config = Path(name) / "config.json"
    if not config.is_file():
        return None
    return read_json_object(config).get("model_type")
