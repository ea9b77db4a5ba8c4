"""The tokenizer service: text to ids and back, chat templates, the vocabulary.

    __main__ → service → work | checks          threads and their bound; what is accepted
               service → served → chat → guard  no message forges a control token
                                  chat → template_process → template_worker
               service → streaming              whole characters
               service → served → loading → byte_level | library → decoders → document → encodings

Only `service`, `work`, `checks` and `settings` know grpc, the protos or metrics.
"""
