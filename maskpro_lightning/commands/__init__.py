"""What the commands of ``maskpro`` do beside fitting."""
