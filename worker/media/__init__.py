"""Reading and writing media: decode what users send, with caps, and encode what runners make."""
