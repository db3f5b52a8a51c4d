"""What was lost, measured: quality, errors of tensors, sensitivity, tasks, speed."""
