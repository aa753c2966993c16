"""Load modules: from factories, Hugging Face folders, timm, torchvision, and the demo."""
