"""What a recipe needs of a GPU before one is rented: memory, GPUs, time, advice."""
