"""Where a run's numbers can be sent besides its folder: TensorBoard, Weights & Biases, Trackio, a class of your own."""
