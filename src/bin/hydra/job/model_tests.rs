//! Bad models, and the tokenizers of good ones.

use super::model::{Data, Tokenizer};
use super::tests::{MODEL, fault, good};

/// Each line goes after a small good model; the message must hold the dotted key and the advice.
#[test]
fn bad_models() {
    for (line, want) in [
        ("bacth = 4", "model.0.bacth: unknown key; did you mean `batch`?"),
        ("zzzzzzzzz = 4", "model.0.zzzzzzzzz: unknown key; the keys here are name, from"),
        ("'two words\\n' = 4", "unknown key"),
        ("batch = 0", "model.0.batch: want a whole number from 1 to 2147483647, got 0"),
        ("batch = -3", "model.0.batch: want a whole number from 1"),
        ("batch = 3000000000", "model.0.batch: want a whole number from 1"),
        ("batch = 1.5", "got 1.5"),
        ("batch = '4'", "got \"4\""),
        ("batch = 10\nmicrobatch = 4", "model.0.microbatch: 4 does not divide the batch of 10; 2 does"),
        ("microbatch = 2", "2 does not divide the batch of 1; 1 does"),
        ("epochs = 1", "model.0.epochs: steps is there too"),
        ("from = 'hub'", "model.0.family: from is there too"),
        ("dtype = 'f16'", "model.0.dtype: want one of \"f32\", \"bf16\", \"tf32\", got \"f16\"; did you mean"),
        ("dtype = 3", "model.0.dtype: want one of \"f32\""),
        ("config = { a = nan }", "model.0.config: a is nan, which JSON cannot hold"),
        ("config = { a = 1979-05-27 }", "which JSON cannot hold"),
        ("config = 3", "model.0.config: want a table"),
        ("optimizer = 'adamw'", "model.0.optimizer: want a table"),
        ("optimizer = { knid = 'sgd' }", "model.0.optimizer.knid: unknown key; did you mean `kind`?"),
        (
            "optimizer = { kind = 'adam' }",
            "model.0.optimizer.kind: want one of \"adamw\", \"sgd\", got \"adam\"; did you mean \"adamw\"?",
        ),
        ("optimizer = { lr = -1 }", "model.0.optimizer.lr: want a number of at least 0, got -1"),
        ("optimizer = { lr = 9e307 }", "model.0.optimizer.lr: want a number that f32 can hold, got 9e307"),
        ("optimizer = { eps = 1e39 }", "model.0.optimizer.eps: want a number that f32 can hold, got 1e39"),
        ("optimizer = { lr = nan }", "model.0.optimizer.lr"),
        ("optimizer = { lr = inf }", "model.0.optimizer.lr"),
        ("optimizer = { betas = [0.9, 1.0] }", "model.0.optimizer.betas: want two numbers"),
        ("optimizer = { betas = [0.9] }", "got [0.9]"),
        ("optimizer = { betas = [-0.1, 0.9] }", "model.0.optimizer.betas"),
        ("optimizer = { eps = -1e-8 }", "model.0.optimizer.eps"),
        ("optimizer = { weight_decay = -1 }", "model.0.optimizer.weight_decay"),
        ("frozen = 'wte'", "model.0.frozen: want a list of beginnings of parameters' names"),
        ("frozen = ['']", "model.0.frozen: want a list"),
        ("lora = { rank = 4 }", "model.0.lora.targets: is missing; write a list of names of linear layers"),
        ("lora = { targets = [] }", "model.0.lora.targets: is missing"),
        ("lora = { targets = ['c_attn'], rank = 0 }", "model.0.lora.rank: want"),
        ("lora = { targets = ['c_attn'], rank = 20000 }", "model.0.lora.rank: want 16384 at most, got 20000"),
        ("lora = { targets = ['c_attn'], alpha = 0 }", "model.0.lora.alpha: want a number above 0"),
        ("lora = { targets = ['c_attn'], dropout = 1 }", "model.0.lora.dropout: want a number from 0 to below 1"),
        ("lora = { targets = ['c_attn'], r = 4 }", "model.0.lora.r"),
        ("lora = { targets = ['c_attn'] }\nfrozen = ['wte']", "model.0.frozen: lora is there too"),
        ("optimizer = { clip = 0 }", "model.0.optimizer.clip: want a number above 0"),
        ("optimizer = { decay = 'matrix' }", "did you mean \"matrices\"?"),
        ("optimizer = { momentum = 0.9 }", "model.0.optimizer.momentum: is for kind = \"sgd\" only"),
        ("optimizer = { kind = 'sgd', betas = [0.9, 0.9] }", "model.0.optimizer.betas: is for kind = \"adamw\" only"),
        ("optimizer = { kind = 'sgd', nesterov = true }", "model.0.optimizer.nesterov: needs momentum above 0"),
        (
            "optimizer = { kind = 'sgd', momentum = 1.5 }",
            "model.0.optimizer.momentum: want a number from 0 up to, not including, 1, got 1.5",
        ),
        ("optimizer = { kind = 'sgd', momentum = -0.1 }", "model.0.optimizer.momentum: want a number from 0"),
        ("optimizer = { kind = 'sgd', nesterov = 1 }", "want true or false, got 1"),
        ("schedule = {}", "model.0.schedule.kind: is missing"),
        ("schedule = { kind = 'cos' }", "model.0.schedule.kind: want one of"),
        ("schedule = { kind = 'constant', warmup = 3 }", "model.0.schedule.warmup: is for"),
        ("schedule = { kind = 'cosine', warmup = -1 }", "model.0.schedule.warmup: want a whole number from 0"),
        ("schedule = { kind = 'cosine', min_lr = -1e-9 }", "model.0.schedule.min_lr"),
        (
            "optimizer = { kind = 'sgd', lr = 0.1 }\nschedule = { kind = 'linear', min_lr = 0.2 }",
            "model.0.schedule.min_lr: 0.2 is above the learning rate of 0.1",
        ),
        (
            "optimizer = { lr = 1 }\nschedule = { kind = 'cosine', min_lr = 0.2 }\nsearch = { lr = [1, 0.1] }",
            "model.0.search: lr = 0.1: schedule.min_lr: 0.2 is above the learning rate of 0.1",
        ),
        ("valid = { every = 3 }", "model.0.valid: want fraction or text"),
        ("valid = { fraction = 1.0 }", "model.0.valid.fraction: want a number above 0 and below 1"),
        ("valid = { fraction = 0 }", "model.0.valid.fraction"),
        ("valid = { fraction = 0.1, every = 0 }", "model.0.valid.every"),
        ("valid = { text = 'v.txt' }", "model.0.valid.text: goes with text as the training data only; leave valid out"),
        ("valid = { text = 'v.txt', fraction = 0.1 }", "model.0.valid.text: fraction is there too"),
        ("name = 'b'", "no valid TOML"),
    ] {
        let message = fault(&format!("{MODEL}{line}"), &[]);
        assert!(message.contains(want), "{line}\n got {message}\nwant {want}");
    }
}

#[test]
fn tokenizers() {
    let check = |source: &str, tokenizer: &str, want: Tokenizer| {
        let text = MODEL.replace("family = 'gpt2'", source);
        let text = text.replace("random = true", &format!("text = 'a', context = 4{tokenizer}"));
        let job = good(&text);
        assert!(matches!(&job.models[0].data, Data::Text { tokenizer, .. } if *tokenizer == want), "{text}");
    };
    for source in ["family = 'gpt2'", "from = 'dir'"] {
        check(source, ", tokenizer = 'bytes'", Tokenizer::Bytes);
        check(source, ", tokenizer = './bytes'", Tokenizer::File("/jobs/bytes".into()));
        check(source, ", tokenizer = '/abs/t.json'", Tokenizer::File("/abs/t.json".into()));
    }
    check("from = 'dir'", "", Tokenizer::OfModel);
}
