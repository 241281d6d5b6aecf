"""What a recipe needs of a GPU before one is rented: memory, cards, time, advice."""
