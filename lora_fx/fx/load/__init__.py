"""The loading of models: factories, Hugging Face folders, timm, torchvision, and the demo."""
