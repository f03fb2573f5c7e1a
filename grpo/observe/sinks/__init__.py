"""Where a run's numbers can be sent besides its folder: TensorBoard, Weights & Biases, a class of your own."""
