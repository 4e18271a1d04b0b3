//! The observer of a run's models: a watch for each, and the inbox, through which models join and leave while others
//! train.
//!
//! A model has a number in the job, where models that were added later come last, and one in the fleet, which has only
//! models that train. Nothing in the inbox ends the run: a request that cannot be met is refused with a reason.

use crate::plan::{PlannedJob, Sharing, plan_added, warn_of_warmups};
use crate::print::{note, warn};
use crate::run::inbox::{Inbox, InboxFile, Request};
use crate::run::judge::{Judge, Judges};
use crate::run::live::Live;
use crate::run::progress::{Board, Progress};
use crate::run::standing::Standing;
use crate::run::watch::Watch;
use crate::rundir::{self, RunDir};
use hydra::base::{Error, Result, nearest};
use hydra::engine::Engine;
use hydra::spill::{FleetMap, Placed};
use hydra::train::metrics::Metrics;
use hydra::train::results::Status;
use hydra::train::{Fleet, FleetObserver, Observer};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Observes the models of one run.
pub struct RunObserver<'a> {
    /// The job, including models that were added since.
    pub planned: PlannedJob,
    /// Each model's standing, by number in the job.
    pub standings: Vec<Standing>,
    /// Each model's watch, by number in the fleet.
    pub watches: Vec<Watch<'a>>,
    /// The models' numbers in the job, by number in the fleet.
    pub active: Vec<usize>,
    pub dir: &'a mut RunDir,
    pub board: Board,
    /// The display of the devices' work, if it is shown.
    pub live: Option<Live>,
    pub judges: Judges,
    pub inbox: Inbox,
    /// Bytes of each device's arena.
    pub arenas: Vec<u64>,
    /// The part of them that weight slots fill, however many models are added: as in the first map.
    pub filled: Vec<Option<u64>>,
    pub stop: &'a AtomicBool,
    /// The exit codes of models that have failed, by number in the job.
    pub codes: BTreeMap<usize, u8>,
    /// The time that the last checkpoints of all models took.
    pub saving: Rc<Cell<Duration>>,
}

impl<'a> RunObserver<'a> {
    /// Observes the run of a job, given how far its models had come, what judges them, and the bytes of the fleet's
    /// arenas. It watches no model yet.
    pub fn new(
        (planned, standings, judges): (PlannedJob, Vec<Standing>, Judges),
        dir: &'a mut RunDir,
        (fleet, arenas): (&Fleet, Vec<u64>),
        stop: &'a AtomicBool,
        quiet: bool,
    ) -> RunObserver<'a> {
        let active = standings.iter().filter(|s| s.ended.is_none()).count();
        let board = Board::new(quiet, active, planned.machine.devices.len());
        RunObserver {
            live: board.live(fleet.engine()),
            inbox: Inbox::new(dir.at(rundir::INBOX)),
            filled: planned.map.arena_bytes.iter().copied().map(Some).collect(),
            planned,
            standings,
            watches: Vec::new(),
            active: Vec::new(),
            dir,
            board,
            judges,
            arenas,
            stop,
            codes: BTreeMap::new(),
            saving: Rc::default(),
        }
    }

    /// Watches model number `number` of the job, which is the fleet's next model.
    ///
    /// # Errors
    /// When its files cannot be written.
    pub fn watch(&mut self, number: usize, validates: bool) -> Result<()> {
        let files = self.files(number)?;
        self.watch_with(number, validates, files);
        Ok(())
    }

    /// Opens what a model writes to while it trains: its folder, the metrics in it, and its judge.
    fn files(&mut self, number: usize) -> Result<(PathBuf, Metrics, Option<Judge>)> {
        let name = &self.planned.job.models[number].name;
        let folder = self.dir.folder(name)?;
        let metrics = folder.join(rundir::METRICS);
        self.dir.will_make(&metrics);
        self.dir.will_make(&self.dir.at(rundir::SELECTION));
        let judge = self.judges.judge(number, name)?;
        let from = self.standings[number].from;
        let metrics = Metrics::open(&metrics, from)?;
        if metrics.missing() > 0 {
            let (path, missing) = (metrics.path().display(), metrics.missing());
            warn(format!("{path}: {missing} of the rows of {from} steps are missing; the run goes on without them"));
        }
        Ok((folder, metrics, judge))
    }

    fn watch_with(
        &mut self,
        number: usize,
        validates: bool,
        (folder, metrics, judge): (PathBuf, Metrics, Option<Judge>),
    ) {
        let (model, from) = (&self.planned.models[number], self.standings[number].from);
        let progress = Progress::new(&self.board, &model.prepared.name, from, model.prepared.options.steps);
        let mut watch =
            Watch::new(model, (&folder, from), metrics, progress, (self.stop, &self.saving), judge, validates);
        self.standings[number].ends.iter().for_each(|status| watch.end_early(status.clone()));
        self.watches.push(watch);
        self.active.push(number);
    }

    /// Adds the models of a file, all of them or none.
    fn add(&mut self, fleet: &mut Fleet, file: &InboxFile) -> Result<()> {
        let path = &file.path;
        let why_not = match &self.planned.sharing {
            Sharing::Turns(_) => None,
            Sharing::Alone => Some(
                "the run began with one model, which has its device to itself; one that begins with two takes others",
            ),
            Sharing::Lines(_) => {
                Some("models that run in lines take no others; a run does whose policy is no baseline")
            }
        };
        if let Some(why) = why_not {
            return Err(Error::bad(format!("{}: {why}", path.display())));
        }
        self.inbox.check_new(file)?;
        let mut job = self.planned.job.clone();
        job.add(path)?;
        let first = self.planned.models.len();
        for model in &job.models[first..] {
            let folder = self.dir.at(&model.name);
            if folder.exists() {
                return Err(model.fault("name", format!("{} is there already; name another", folder.display())));
            }
        }
        let there: Vec<Placed> = self.active.iter().map(|&m| self.planned.models[m].placed.clone()).collect();
        let added = plan_added(&self.planned, &job, &there, &self.arenas)?;
        // From here on they belong to the run: they are still there when it is resumed, and any error is a model's
        // failure.
        self.inbox.take(file);
        warn_of_warmups(&job, first, &added);
        self.planned.job = job;
        self.planned.models.extend(added);
        self.standings.resize_with(self.planned.models.len(), Standing::default);
        let from: Vec<u64> = self.standings.iter().map(|s| s.from).collect();
        self.judges.extend(&self.planned.job, &from);
        for number in first..self.planned.models.len() {
            let added_to_fleet = self.add_model(fleet, number);
            let name = &self.planned.job.models[number].name;
            match added_to_fleet {
                Ok(()) => note(format!("{name}: has joined the run ({})", path.display())),
                Err(error) => {
                    warn(format!("{}: {name}: {error}", path.display()));
                    self.codes.insert(number, error.exit_code());
                    self.standings[number].ended = Some(Status::Failed(error.to_string()));
                }
            }
        }
        self.plan_again();
        Ok(())
    }

    /// Adds model number `number` of the job to the fleet.
    fn add_model(&mut self, fleet: &mut Fleet, number: usize) -> Result<()> {
        let model = Rc::clone(&self.planned.models[number]);
        let (sources, files) = (model.prepared.sources(&self.planned.texts)?, self.files(number)?);
        let validates = sources.valid.is_some();
        fleet.wait_add(model.fleet_model(sources))?;
        if let Some(mut recorder) = fleet.engine_mut().take_recorder() {
            recorder.add_model(model.prepared.name.clone(), model.prepared.options.steps);
            fleet.engine_mut().record(recorder);
        }
        self.watch_with(number, validates, files);
        Ok(())
    }

    /// Rewrites plan.json with the models that were added.
    fn plan_again(&mut self) {
        let in_run = |(_, standing): &(_, &Standing)| !matches!(standing.ended, Some(Status::Failed(_)));
        let models = self.planned.models.iter().zip(&self.standings).filter(in_run);
        let placed: Vec<Placed> = models.map(|(model, _)| model.placed.clone()).collect();
        let before = std::mem::replace(&mut self.planned.map, FleetMap::within(&placed, &self.filled));
        // Memory that was once in use is part of the peak.
        let bytes = self.planned.map.arena_bytes.iter_mut().zip(before.arena_bytes);
        bytes.for_each(|(now, before)| *now = before.max(*now));
        let plan =
            self.planned.predict_step().and_then(|()| self.dir.write(rundir::PLAN, self.planned.text().as_bytes()));
        if let Err(error) = plan {
            // The run does not depend on the file, so keeping its first plan is no failure.
            warn(format!("{}: {error}", rundir::PLAN));
        }
    }

    /// Lets the model called `name` end.
    fn cancel(&mut self, fleet: &mut Fleet, name: &str) -> Result<()> {
        let Some(number) = self.planned.job.models.iter().position(|m| m.name == name) else {
            let names: Vec<&str> = self.planned.job.models.iter().map(|m| m.name.as_str()).collect();
            let near = nearest(name, names).map_or(String::new(), |near| format!("; did you mean {near:?}?"));
            return Err(Error::bad(format!("the run has no model called {name:?}{near}")));
        };
        let at = self.active.iter().position(|&m| m == number).filter(|&at| self.watches[at].status.is_none());
        let Some(at) = at else { return Err(Error::bad(format!("{name:?} has come to its end already"))) };
        // A model that resumes from a checkpoint has something to save, once it is its turn.
        if fleet.is_waiting(at) && self.standings[number].from == 0 {
            fleet.cancel(at, Error::bad("cancelled"))?;
            self.watches[at].end(Status::Cancelled);
        } else {
            self.watches[at].end_early(Status::Cancelled);
        }
        Ok(())
    }

    /// Notes models that have failed since the last look.
    fn note_failures(&mut self, fleet: &Fleet) {
        for (number, watch) in self.watches.iter_mut().enumerate().filter(|(_, w)| w.status.is_none()) {
            if let Some(error) = fleet.failure(number) {
                self.codes.insert(self.active[number], error.exit_code());
                watch.end(Status::Failed(error.to_string()));
            }
        }
    }
}

impl FleetObserver for RunObserver<'_> {
    fn of_model(&mut self, model: usize) -> &mut dyn Observer {
        &mut self.watches[model]
    }

    fn name(&self, model: usize) -> Option<String> {
        let models = &self.planned.job.models;
        (models.len() > 1).then(|| models[self.active[model]].name.clone())
    }

    fn task_ended(&mut self, engine: &Engine) {
        self.live.iter_mut().for_each(|live| live.look(engine));
    }

    /// Looks into the inbox, at most twice a second, and once more before the run ends. Planning an added model takes a
    /// moment, in which the devices go on with their queues.
    fn between(&mut self, fleet: &mut Fleet) -> Result<()> {
        self.note_failures(fleet);
        if self.stop.load(Ordering::Relaxed) {
            // Files there wait for the resumed run.
            return Ok(());
        }
        let files = if fleet.is_over() { self.inbox.wait_look() } else { self.inbox.look() };
        for file in files {
            let done = match &file.request {
                Request::Add => self.add(fleet, &file),
                Request::Nothing(what) => Err(Error::bad(format!("{}: is {what}, and no file", file.path.display()))),
                Request::Cancel(name) => {
                    let checked = self.inbox.check_new(&file);
                    checked.and_then(|()| self.cancel(fleet, name)).map(|()| self.inbox.take(&file))
                }
            };
            if let Err(why) = done {
                self.inbox.refuse(&file, &why);
            }
        }
        Ok(())
    }
}
