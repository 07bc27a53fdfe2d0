"""Positions of images and targets, searched by the collators instead of the model."""

import pytest
import torch
from batch_parts import collate
from model_parts import build_batch, build_tiny_model
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from metamorph.data.batching.collation import PaddedCollator
from metamorph.models.batch_indices import first_image_starts, index_batch


@pytest.mark.parametrize("packed", [False, True])
def test_batches_with_indices_give_the_same(packed):
    model = build_tiny_model()
    results = []
    for image_token_id in (None, model.config.image_token_id):
        batch = collate(model.config, packed, image_token_id)
        assert ("indices" in batch) == (image_token_id is not None)
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        results.append((output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (one, one_gradients), (other, other_gradients) = results
    for name in ("loss", "text_loss", "visual_loss", "visual_cosine", "num_text_tokens", "num_visual_tokens"):
        torch.testing.assert_close(one[name], other[name], msg=name)
    assert (one.num_text_tokens, one.num_visual_tokens) == (11, 4)
    for name, gradient in one_gradients.items():
        torch.testing.assert_close(gradient, other_gradients[name], msg=name)


def test_r06_forward_and_backward_never_ask_the_device():
    """Fake tensors have no values, as a GPU's have none yet: whatever needs one raises.

    Transformers' own look at positions or mask is not seen here: it is left out where tensors are fake.
    """
    model = build_tiny_model().train()
    model.packed_kernel = None  # a mask of another class than fake tensors
    for packed in (False, True):
        for image_token_id, asks in ((model.config.image_token_id, False), (None, True)):
            batch = collate(model.config, packed, image_token_id)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                normalizers = (mode.from_tensor(torch.tensor(11.0)), mode.from_tensor(torch.tensor(4.0)))
                batch["indices"] = {
                    name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                    for name, value in batch.get("indices", {}).items()
                }
                batch = {name: value if name == "indices" else mode.from_tensor(value) for name, value in batch.items()}
                batch["indices"] = batch["indices"] or None
                if asks:
                    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                        model(**batch, loss_normalizers=normalizers)
                else:
                    model(**batch, loss_normalizers=normalizers).loss.backward()


class ValuesRead(TorchDispatchMode):
    """Counts the reads of a tensor's value by Python, for each of which the host would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_r06_transformers_does_not_look_at_packed_rows():
    model = build_tiny_model().train()
    image = model.config.image_token_id
    # For padded rows it looks at positions once, to see that they are not packed.
    for packed, reads in ((True, 0), (False, 1)):
        batch = collate(model.config, packed, image)
        with ValuesRead() as values:
            model(**batch, loss_normalizers=(torch.tensor(11.0), torch.tensor(4.0))).loss.backward()
        assert values.count == reads


def test_first_image_starts_are_one_for_each_answer_with_an_image():
    """Two answers in the first row, of which the first has two images; none with an image in the second row."""
    start, text, image, none = 7, 5, -1, -100
    rows = [
        [none, text, start, image, image, text, start, image, text, none, none, start, image, text],
        [none, none, text, text, none, none, text, none, none, none, none, none, none, none],
    ]
    mask = torch.tensor(rows) == image
    labels = torch.tensor(rows).masked_fill(mask, none)
    assert first_image_starts(labels, mask, start).tolist() == [1, 10]
    assert first_image_starts(labels[1:], mask[1:], start).tolist() == []


def test_lengths_of_samples_exclude_padding():
    config = build_tiny_model().config
    for packed in (False, True):
        lengths = collate(config, packed, config.image_token_id)["indices"]["sample_lengths"]
        assert lengths.tolist() == [11, 11, 6]


def test_empty_batch():
    batch = PaddedCollator(0, 61)([])
    assert all(
        len(index) == 0 for name, index in batch["indices"].items() if name != "tokens"
    )  # which has one at least
    assert build_tiny_model()(**batch).loss == 0


def test_r02_targets_must_be_placeholders():
    config = build_tiny_model().config
    batch = build_batch(config, "g")
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["visual_target_mask"]
    mask[0, 1] = True
    with pytest.raises(ValueError, match=r"visual_target_mask selects 5 predictable positions, but 4 of them"):
        index_batch(ids, labels, mask, config.image_token_id)
    ids = ids.clone()
    ids[0, 0] = config.image_token_id
    mask[0, 1], mask[0, 0] = False, True
    with pytest.raises(ValueError, match="first position of a row cannot be a target"):
        index_batch(ids, labels, mask, config.image_token_id)
