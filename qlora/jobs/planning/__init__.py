"""What a training needs before it begins: whether it fits, which method, which recipe."""
