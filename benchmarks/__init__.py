"""Programs that measure what audits cost and what attacks recover."""
