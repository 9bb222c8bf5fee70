"""What a checkpoint's routing is worth: measured on documents, shown on pages."""
