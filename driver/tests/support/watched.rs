//! An API server of one kind of object: those that are there at first, and those that come later.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Bytes, Frame};
use hyper::{Request, Response};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnboundedReceiverStream;

#[derive(Debug, Clone)]
pub(crate) struct Watched {
    objects: Arc<Mutex<Vec<Value>>>,
    added: mpsc::UnboundedSender<Value>,
    adding: Arc<Mutex<Option<mpsc::UnboundedReceiver<Value>>>>,
}

impl Watched {
    pub(crate) fn new(objects: Vec<Value>) -> Self {
        let (added, adding) = mpsc::unbounded_channel();
        let objects = objects.into_iter().map(as_stored).collect();
        Self { objects: Arc::new(Mutex::new(objects)), added, adding: Arc::new(Mutex::new(Some(adding))) }
    }

    pub(crate) fn add(&self, object: Value) {
        let object = as_stored(object);
        self.objects.lock().unwrap().push(object.clone());
        self.added.send(object).unwrap();
    }

    pub(crate) fn client(&self) -> Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let server = server.clone();
            async move { Ok::<_, Infallible>(server.answer(&request)) }
        });
        Client::new(service, "default")
    }

    fn answer(&self, request: &Request<Body>) -> Response<BoxBody<Bytes, Infallible>> {
        let (path, query) = (request.uri().path(), request.uri().query().unwrap_or_default());
        if query.contains("watch=true") {
            return Response::new(self.changes());
        }
        let objects = self.objects.lock().unwrap();
        let named = |object: &&Value| path.contains(object["metadata"]["name"].as_str().unwrap());
        let answer = match objects.iter().find(named) {
            Some(object) => object.clone(),
            None => json!({"metadata": {"resourceVersion": "1"}, "items": *objects}),
        };
        Response::new(Full::from(answer.to_string()).boxed())
    }

    /// What comes from now on. Whoever asks again waits for ever.
    fn changes(&self) -> BoxBody<Bytes, Infallible> {
        let adding = self.adding.lock().unwrap().take();
        let adding = adding.unwrap_or_else(|| mpsc::unbounded_channel().1);
        let lines = UnboundedReceiverStream::new(adding).map(|object| {
            let line = json!({"type": "ADDED", "object": object}).to_string() + "\n";
            Ok::<_, Infallible>(Frame::data(Bytes::from(line)))
        });
        StreamBody::new(lines).boxed()
    }
}

fn as_stored(mut object: Value) -> Value {
    object["metadata"]["resourceVersion"] = "1".into();
    object["metadata"]["uid"] = object["metadata"]["name"].clone();
    object
}
