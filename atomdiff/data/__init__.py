"""Images, captions and masks from folders, and what a network gets of them."""
