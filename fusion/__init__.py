"""Everything computed with models and distributions: functions over arrays and tensors, no files, no configuration."""
