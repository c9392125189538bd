"""The slide viewer: a page that opens from disk, with pictures and data of slides and models in files beside it."""
