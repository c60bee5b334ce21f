"""From a model and a folder of images to a policy that is fitted to that model."""
