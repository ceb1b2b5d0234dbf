"""Looking at pictures: features, captions and the judge that prior/ and evaluate/ share."""
