"""The ops: one file a family, from the public function down to the registered operator."""
