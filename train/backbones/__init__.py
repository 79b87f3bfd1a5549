"""The backbones behind one interface (`train.backbones.base.Backbone`)."""
