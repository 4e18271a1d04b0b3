//! What `--set` changes, and what it refuses.

use super::model::{Data, ValidPart};
use super::tests::{MODEL, WHOLE, check_with, fault, good};
use super::{DeviceKind, Policy};
use hydra::train::Optimizer;
use std::path::Path;

#[test]
fn overrides() {
    let set = |sets: &[&str]| check_with(WHOLE, sets).unwrap_or_else(|error| panic!("{sets:?}: {error}"));
    let job = set(&["model.0.lr=1e-2", "model.1.momentum=0.5", "run.policy=fifo", "device.0.memory=1 GiB"]);
    assert!(matches!(job.models[0].optimizer, Optimizer::Adamw { lr: 1e-2, .. }));
    assert!(matches!(job.models[1].optimizer, Optimizer::Sgd { momentum: 0.5, .. }));
    assert_eq!((job.run.policy, job.devices[0].memory), (Policy::Turns("fifo"), Some(1 << 30)));
    let job = set(&["model.0.optimizer.betas.1=0.5", "model.0.name=\"x\"", " run.out = elsewhere ", "run.seed=4"]);
    assert!(matches!(job.models[0].optimizer, Optimizer::Adamw { betas: (0.9, 0.5), .. }));
    assert_eq!(
        (job.models[0].name.as_str(), &job.run.out, job.run.seed),
        ("x", &"/jobs/elsewhere/part-0-of-1".into(), 4)
    );
    let job =
        set(&["model.1.valid.fraction=0.25", "model.1.valid={ fraction = 0.5 }", "model.0.data.text=['a', 'b=c']"]);
    assert_eq!(job.models[1].valid.as_ref().map(|v| &v.part), Some(&ValidPart::Fraction(0.5)));
    assert!(matches!(&job.models[0].data, Data::Text { paths, .. } if paths[1] == Path::new("/jobs/b=c")));
    // Tables on the way are made where they are missing.
    let job = check_with(MODEL, &["model.0.lr=0.5", "host.disk.path=d", "host.disk.memory=1 MiB"]).unwrap();
    assert!(matches!(job.models[0].optimizer, Optimizer::Adamw { lr: 0.5, .. }));
    assert!(job.host.disk.is_some());
    // The record is the merged job: reading it again gives the same one.
    let again = good(&job.source_text);
    assert_eq!(format!("{:?}", (&again.run, &again.devices, &again.host, &again.models)), {
        format!("{:?}", (&job.run, &job.devices, &job.host, &job.models))
    });
    let whole = set(&["run.slots=9"]);
    assert_eq!(format!("{:?}", good(&whole.source_text).models), format!("{:?}", good(WHOLE).models));

    let deep = format!("{}=1", vec!["a"; 17].join("."));
    for (setting, want) in [
        ("model.0.lr", "--set model.0.lr: want PATH=VALUE"),
        ("=3", "want a path such as model.0.lr"),
        ("run..seed=3", "want a path such as model.0.lr"),
        (deep.as_str(), "want a path such as model.0.lr"),
        ("model.3.lr=1", "model.3: want an index from 0 to 2"),
        ("model.-1.lr=1", "model.-1: want an index from 0 to 2"),
        ("model.x.lr=1", "model.x: want an index from 0 to 2"),
        ("run.seed.x=1", "run.seed: leads through 1, which has no parts"),
        ("model.0.optimizer.betas.2=1", "model.0.optimizer.betas.2: want an index from 0 to 1"),
        ("model.0.optimizer.betas=[0.1", "the value is no TOML"),
        ("model.0.rl=1", "model.0.rl: unknown key"),
        ("model.0.lr=fast", "model.0.optimizer.lr: want a number"),
        ("model.0.lr=", "model.0.optimizer.lr: want a number"),
        ("model.0.betas=1\nlr = 2", "model.0.optimizer.betas"),
        ("model=3", "model: want tables"),
        ("nothing.at.all=3", "nothing: unknown key"),
    ] {
        let message = fault(WHOLE, &[setting]);
        assert!(message.contains(want), "{setting}\n got {message}\nwant {want}");
    }
    assert!(fault(MODEL, &["device.1.count=2"]).contains("device: the job file has no [[device]]"));
    // The device that a job has without saying so.
    let job = check_with(MODEL, &["device.0.memory=1 MiB"]).unwrap();
    assert_eq!((job.devices.len(), job.devices[0].kind, job.devices[0].memory), (1, DeviceKind::Host, Some(1 << 20)));
}
