"""What the model learns from: records, pictures, examples and batches."""
