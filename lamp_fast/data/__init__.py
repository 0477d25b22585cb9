"""Pictures: data sets, the protocol that draws from them, and batches to compute on."""
