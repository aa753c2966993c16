"""Where a module comes from: factories, Hugging Face folders, timm and torchvision, the demo."""
