"""Each op's definition in plain PyTorch: slow, obviously right, any floating dtype. Imports only torch."""
