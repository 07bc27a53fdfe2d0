"""TRL's `SFTTrainer` trains on the text of a data set with images, as an ordinary vision-language model."""

import copy

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from metamorph import MetaMorphForConditionalGeneration
from metamorph.mini import shipped_folder


FOLDER = shipped_folder("mini", "model")
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the object?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_sft_trainer_computes_our_text_loss(tmp_path, form):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = MetaMorphForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(FOLDER)
    image = Image.new("RGB", (50, 40), "red")
    fields = {"messages": MESSAGES} if form == "messages" else {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}
    dataset = datasets.Dataset.from_list([{**copy.deepcopy(fields), "images": [image]} for _ in range(2)])
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to=[],
        max_length=None,
        gradient_checkpointing=False,
    )

    batch = processor.apply_chat_template(MESSAGES, images=[image], tokenize=True, return_assistant_tokens_mask=True)
    learned = batch.pop("assistant_masks").bool()
    labels = batch["input_ids"] if form == "messages" else batch["input_ids"].masked_fill(~learned, -100)
    with torch.no_grad():
        expected = model(**batch, labels=labels).text_loss.item()
    before = model.lm_head.weight.detach().clone()

    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=processor)
    trainer.train()

    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert not torch.equal(model.lm_head.weight.detach().cpu(), before)
