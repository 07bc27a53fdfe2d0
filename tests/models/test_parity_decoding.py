"""Greedy decoding gives the original's token ids and visual tokens."""

import pytest
import torch
from golden_parts import ORIGINAL_IMAGE, PLACEHOLDER, assert_close, golden_model, numbers, tensors


pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def model():
    model = golden_model().eval()
    # `generate` needs a logit for the placeholder, which the original's vocabulary does not have.
    head = torch.nn.Linear(model.lm_head.in_features, PLACEHOLDER + 1, bias=False)
    head.weight = torch.nn.Parameter(torch.cat([model.lm_head.weight.detach(), torch.zeros(1, head.in_features)]))
    model.lm_head = head
    return model


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("case", ["gen", "text", "vqa", "i2i"])
def test_greedy_decoding(model, case, use_cache):
    reference, description = tensors("micro/decode"), numbers("micro/scalars")["decode"][case]
    count = model.config.num_image_tokens
    prompt = []
    for token in reference[f"{case}.prompt_ids"][0].tolist():
        prompt += [PLACEHOLDER] * count if token == ORIGINAL_IMAGE else [token]
    image = description["image_index_in_batch"]
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        pixel_values=None if image is None else tensors("micro/batch")["images"][image : image + 1],
        max_new_tokens=60,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=numbers("micro/config")["ids"]["end_of_text"],
    )
    generated = output.sequences[0, len(prompt) :]
    text = generated[generated != PLACEHOLDER].tolist()
    assert text == reference[f"{case}.output_ids"].tolist()
    assert output.visual_tokens.shape[0] * count == description["n_visual"]
    if description["n_visual"]:
        assert_close(output.visual_tokens.flatten(0, 1), reference[f"{case}.image_embeds"])
